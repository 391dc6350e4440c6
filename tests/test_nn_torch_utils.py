"""All our modules under what torch does to modules: hooks that change parameters, and inputs of other layouts."""

import pytest
import torch
from torch.nn.utils import prune, spectral_norm, weight_norm

from memkernels import nn

STEPS = torch.randn(2, 4, 6)
MODULES = {
    "LSTM": (lambda: nn.LSTM(6, 5, batch_first=True), "weight_hh_l0"),
    "GRU": (lambda: nn.GRU(6, 5, batch_first=True), "weight_hh_l0"),
    "RNN": (lambda: nn.RNN(6, 5, batch_first=True), "weight_hh_l0"),
    "NTM": (lambda: nn.NTM(6, 5, 3, slots=4, width=3), "weight_hh"),
    "DNC": (lambda: nn.DNC(6, 5, slots=4, width=3, read_heads=1), "controller.weight_hh_l0"),
    "DNC interface": (lambda: nn.DNC(6, 5, slots=4, width=3, read_heads=1), "interface.weight"),
    "SAM": (lambda: nn.SAM(6, hidden_size=5, output_size=3, slots=9, width=4), "controller.weight_hh"),
    "ExternalMemory": (lambda: nn.ExternalMemory(6, slots=4, width=3, read_heads=1, mode="content"), "interface.weight"),
    "ProductKeyMemory": (lambda: nn.ProductKeyMemory(6, 4, heads=1), "query.weight"),
    "HopfieldRetrieval": (lambda: nn.HopfieldRetrieval(6, patterns=3), "query.weight"),
}


def owner(module, name):
    *path, leaf = name.split(".")
    return module.get_submodule(".".join(path)), leaf


class Quantized(torch.nn.Module):
    """As torch.ao's dynamic quantization leaves a Linear."""

    def weight(self):
        return None


def loss(module, x):
    found = module(x)
    return (found[0] if isinstance(found, tuple) else found).square().sum()


@pytest.mark.parametrize(
    "change", [weight_norm, spectral_norm, lambda m, name: prune.l1_unstructured(m, name, 0.5)], ids=["weight", "spectral", "prune"]
)
@pytest.mark.parametrize("name", MODULES)
def test_parameters_of_hooks(name, change):
    """A hook that makes a parameter anew before each call is run: the original learns, and a second step is not of stale values."""
    make, parameter = MODULES[name]
    torch.manual_seed(0)
    module = make().eval()
    part, leaf = owner(module, parameter)
    change(part, leaf)
    originals = [p for key, p in part.named_parameters() if key.startswith(f"{leaf}_")]
    for _ in range(2):
        plain = make().eval()
        loss_before = loss(module, STEPS)
        plain.load_state_dict({k: getattr(*owner(module, k)).detach() for k in plain.state_dict()})
        torch.testing.assert_close(loss_before, loss(plain, STEPS))
        module.zero_grad()
        loss_before.backward()
        assert originals and all(p.grad is not None and p.grad.abs().sum() > 0 for p in originals)
        with torch.no_grad():
            for p in originals:
                p.mul_(1.5)


WHOLE_SEQUENCES = {name: MODULES[name][0] for name in ("LSTM", "GRU", "RNN", "NTM", "DNC", "ProductKeyMemory", "HopfieldRetrieval")} | {
    "DNC.ixaxaar": lambda: nn.DNC.ixaxaar(6, 5, slots=4, width=3, read_heads=1),
    "ExternalMemory dnc": lambda: nn.ExternalMemory(6, slots=4, width=3, read_heads=1, mode="dnc"),
}


@pytest.mark.parametrize("name", WHOLE_SEQUENCES)
def test_exported_with_any_number_of_steps(name):
    """A graph of a module that runs all steps in one op holds for sequences of another length and for another batch."""
    torch.manual_seed(0)
    module, (batch, steps) = WHOLE_SEQUENCES[name]().eval(), torch.export.dims("B", "T")
    exported = torch.export.export(module, (STEPS,), dynamic_shapes=({0: batch, 1: steps},)).module()
    other = torch.randn(3, 7, 6)
    torch.testing.assert_close(exported(other), module(other))


@pytest.mark.parametrize("name", [n for n in MODULES if " " not in n])
def test_nested_and_quantized(name):
    """One error that names the argument, in place of an internal one of torch."""
    module = MODULES[name][0]()
    with pytest.raises(TypeError, match=r": input: expected a dense strided tensor, got a nested tensor"):
        module(torch.nested.nested_tensor([STEPS[0], STEPS[1, :2]]))
    part = owner(module, MODULES[name][1])[0]
    if isinstance(part, torch.nn.Linear):
        (child,) = (key for key, found in module.named_children() if found is part)
        setattr(module, child, Quantized())
        with pytest.raises(TypeError, match=f"{name}: parameters: expected a tensor, got method"):
            module(STEPS)


@pytest.mark.parametrize("name", ["DNC", "SAM", "store"])
def test_states_are_plain_where_parameters_are_not(name):
    """FSDP makes DTensors of the parameters of a part, until that part is called; zeros made from one would be shards too."""

    class Shard(torch.Tensor):
        pass

    store = nn.ExternalMemory(6, slots=4, width=3, read_heads=1, mode="store")
    module = store if name == "store" else MODULES[name][0]()
    module.interface.weight = torch.nn.Parameter(module.interface.weight.detach().as_subclass(Shard))
    tensors = torch.utils._pytree.tree_leaves(tuple(module.initial_state(2)))
    assert {type(t) for t in tensors if isinstance(t, torch.Tensor)} == {torch.Tensor}


CELLS = {cell: (lambda cell=cell: getattr(nn, cell)(6, 5), "weight_ih") for cell in ("LSTMCell", "GRUCell", "RNNCell")}


@pytest.mark.parametrize("bad", [None, 3, "x", [1.0]], ids=repr)
@pytest.mark.parametrize("name", [*MODULES, *CELLS])
def test_what_is_no_tensor(name, bad):
    with pytest.raises(TypeError, match=r"^\w+: input: expected a tensor, got \w+"):
        {**MODULES, **CELLS}[name][0]()(bad)


@pytest.mark.parametrize("bad", [3, STEPS, (STEPS,), (STEPS,) * 3], ids=["number", "tensor", "one", "three"])
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_what_is_no_pair_of_states(name, bad):
    with pytest.raises(TypeError, match=rf"^{name}: hx: expected a tuple of two tensors \(h, c\), got "):
        getattr(nn, name)(6, 5)(STEPS, bad)
    with pytest.raises(TypeError, match=rf"^{name}: hx(\[1\])?: expected a tensor, got NoneType"):
        getattr(nn, name)(6, 5)(STEPS[0], (torch.zeros(4, 5), None))


@pytest.mark.parametrize("bad", [None, 3, "x", [1.0]], ids=repr)
def test_what_is_no_tensor_of_attention(bad):
    with pytest.raises(TypeError, match=r"^MultiheadAttention: key: expected a tensor, got "):
        nn.MultiheadAttention(6, 2)(STEPS, bad, STEPS)
    with pytest.raises((TypeError, ValueError), match=r"^GraphAttention: x: expected .+, got "):
        nn.GraphAttention(6, 2)(bad, torch.zeros(2, 3, dtype=torch.int64))
