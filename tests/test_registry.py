"""What the path of every op promises beside values: versions, capture, explanations, errors of arguments that are no tensors."""

import pytest
import torch
import torch.nn.functional as F

import memkernels as mk
from memkernels._registry import capture


@pytest.fixture
def written():
    one = torch.ones(1, 1, 3)
    return torch.ones(1, 2, 3), torch.ones(1, 1, 2), one, 5 * one


@pytest.mark.parametrize("backend", ["reference", None])
def test_writing_in_place_is_seen_by_autograd(backend, written):
    leaf = torch.randn(1, 2, 3, requires_grad=True)
    memory = leaf * 1
    loss = memory.sin().sum()
    with torch.no_grad(), mk.backend(backend):
        mk.memory_write_(memory, *written[1:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_explain_computes_nothing(written):
    memory = written[0]
    assert mk.explain(mk.memory_write_, *written)["reference"] is None
    assert mk.explain("memory_write_", *written)["reference"] is None
    assert torch.equal(memory, torch.ones(1, 2, 3))
    assert capture(mk.memory_write_, *written)[0].name == "memory_write"


def test_explain_knows_what_is_forced(written):
    with mk.backend("reference"):
        reasons = mk.explain("memory_read", *written[:2])
    assert [name for name, reason in reasons.items() if reason is None] == ["reference"]


@pytest.mark.parametrize("backend", ["cpp", "triton", None])
def test_explain_knows_what_forward_mode_takes(backend, written):
    """Forced or not, the reference runs there, and says so."""
    seen = []

    def read(memory):
        seen.append(mk.explain("memory_read", memory, written[1]))
        return mk.memory_read(memory, written[1])

    with mk.backend(backend):
        value, tangent = torch.func.jvp(read, (written[0],), (written[0],))
        with torch.autograd.forward_ad.dual_level():
            seen.append(mk.explain("memory_read", *written[:2]))
    assert torch.equal(value, tangent)
    for reasons in seen:
        assert reasons.pop("reference") is None
        assert set(reasons.values()) == {"forward-mode AD always runs on the reference"}


def test_explain_of_an_unknown_op():
    with pytest.raises(ValueError, match=r"expected one of .*attention.*got 'nonsense'"):
        mk.explain("nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_backends_that_need_a_device_say_so():
    assert mk.backends()["cuda"] is not None
    assert mk.backends()["reference"] is None


def test_writing_in_place_under_autocast_keeps_the_memory(written):
    memory, weights, erase, add = written
    with torch.autocast("cpu", torch.bfloat16):
        mk.memory_write_(memory, weights, erase, add.bfloat16())
    assert memory.dtype == torch.float32 and torch.equal(memory, 5 * torch.ones(1, 2, 3))


def test_writing_in_place_refuses_transforms(written):
    memory, *others = written
    with pytest.raises(RuntimeError, match=r"memory_write_.*use memory_write"):
        torch.vmap(lambda m: mk.memory_write_(m, *others))(memory[None])


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("far", [2**31, 2**63 - 1, 2**70])
def test_a_window_without_end(backend, far):
    q = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    with mk.backend(backend):
        torch.testing.assert_close(mk.attention(q, q, q, window=(far, far)), F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scale=torch.tensor(0.3, requires_grad=True)), "attention: scale: expected a number, got Tensor"),
        (dict(dropout_p="a"), "attention: dropout_p: expected a number, got str"),
        *(({flag: "no"}, f"attention: {flag}: expected True or False, got 'no'") for flag in ("is_causal", "enable_gqa", "return_lse")),
        (dict(return_lse=torch.ones(2)), "attention: return_lse: expected True or False, got tensor"),
    ],
)
def test_options_of_the_wrong_type(options, message):
    q = torch.randn(1, 1, 5, 4)
    with pytest.raises(TypeError, match=message):
        mk.attention(q, q, q, **options)


@pytest.mark.parametrize("window", [(True, 1), (1, False), (1.0, 1), 3, (1,)])
def test_a_window_of_something_else(window):
    q = torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match=r"attention: window: expected \(left, right\)"):
        mk.attention(q, q, q, window=window)


@pytest.mark.parametrize("flag", [None, 1, "no", torch.ones(2)], ids=str)
def test_a_flag_of_content_read(flag):
    m = torch.randn(1, 5, 4)
    with pytest.raises(TypeError, match="content_read: return_weights: expected True or False, got"):
        mk.content_read(m, m, m[..., 0], return_weights=flag)


def test_tensors_that_are_not_dense():
    with pytest.raises(TypeError, match="memory_read: memory: expected a dense strided tensor, got layout sparse_coo"):
        mk.memory_read(torch.ones(1, 2, 3).to_sparse(), torch.ones(1, 1, 2))


def test_a_level_is_a_name():
    with pytest.raises(TypeError, match="cpu_level: level: expected a level's name or None, got 3"):
        mk.cpu_level(3)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_writing_in_place_compiles_whole(mode, written):
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: mk.memory_write_(*given) * 2, fullgraph=True, backend="aot_eager")
    with mode():
        memory, *others = (t.clone() for t in written)
        doubled = compiled(memory, *others)
    assert torch.equal(memory, 5 * torch.ones(1, 2, 3)) and torch.equal(doubled, 10 * torch.ones(1, 2, 3))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("negative", range(4))
def test_writing_in_place_takes_a_sign_that_is_still_to_be_taken(negative, backend, written):
    arguments = [t.clone() for t in written]
    arguments[negative] = torch.complex(torch.zeros_like(arguments[negative]), -arguments[negative]).conj().imag
    assert arguments[negative].is_neg() and torch.equal(arguments[negative], written[negative])
    with mk.backend(backend):
        assert mk.memory_write_(*arguments) is arguments[0]
    assert torch.equal(arguments[0], mk.memory_write(*written))
