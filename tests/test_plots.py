"""plots.memory_trace: a PNG of what nn.ExternalMemory did, what it refuses, and the error without matplotlib."""

import builtins

import pytest
import torch

import memkernels as mk


@pytest.mark.parametrize("mode", ["content", "ntm"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_trace_of_a_memory(mode, batch_first):
    """The weights explain the reads: weights times memory is what was read; asking changes nothing; gradients pass."""
    torch.manual_seed(0)
    layer = mk.nn.ExternalMemory(6, 5, 4, 2, mode, write_heads=3, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn(7, 2, 6, dtype=torch.float64)
    x = x.transpose(0, 1) if batch_first else x
    plain, state = layer(x)
    output, same, trace = layer(x, return_trace=True)
    assert torch.equal(output, plain) and torch.equal(same.memory, state.memory)
    read, write = (t.transpose(0, 1) if batch_first else t for t in trace[:2])
    assert read.shape == (7, 2, 2, 5) and write.shape == (7, 2, 3, 5)
    torch.testing.assert_close(read.sum(-1), torch.ones_like(read[..., 0]))
    assert (write >= 0).all() and (write.sum(-1) <= 1 + 1e-9).all()
    last = x[:, -1:] if batch_first else x[-1:]
    feature = torch.cat((last.reshape(2, 6), (read[-1] @ state.memory).flatten(1)), -1)
    torch.testing.assert_close(layer.output(feature), output[:, -1] if batch_first else output[-1])
    (gradient,) = torch.autograd.grad(trace.read.square().sum(), layer.interface.weight)
    assert gradient.count_nonzero()
    empty = layer(x[:, :0] if batch_first else x[:0], return_trace=True)[2]
    assert empty.read.numel() == 0


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    weights = torch.softmax(torch.randn(12, 3, 2, 9), -1)
    path = mk.plots.memory_trace(tmp_path / "trace.png", weights, weights[:, :, :1], sample=2, title="copy", rows=(2, 8))
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert mk.plots.memory_trace(str(tmp_path / "one.png"), weights[:, 0]).stat().st_size > 1000


@pytest.fixture
def drawn(monkeypatch):
    """The images that are drawn."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    real = pyplot.Axes.imshow
    monkeypatch.setattr(pyplot.Axes, "imshow", lambda self, image, **kw: drawn.append(torch.tensor(image)) or real(self, image, **kw))
    return drawn


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", ["ntm", "topk"])
def test_what_a_layer_traced_is_drawn_as_it_is(tmp_path, drawn, mode, batch_first):
    layer = mk.nn.ExternalMemory(4, 6, 3, 2, mode, batch_first=batch_first)
    x = torch.randn(5, 3, 4)
    trace = layer(x.transpose(0, 1) if batch_first else x, return_trace=True)[-1]
    mk.plots.memory_trace(tmp_path / "a.png", trace.read, trace.write, index=trace.rows, sample=1, batch_first=batch_first)
    write = trace.write[1, :, 0] if batch_first else trace.write[:, 1, 0]
    assert len(drawn) == 3 and torch.equal(drawn[2].T, write.detach())
    assert drawn[0].shape == (6, 5)
    with pytest.raises(TypeError, match="memory_trace: path: expected the name of a file, got NoneType"):
        mk.plots.memory_trace(None, trace.read)


def test_weights_of_a_few_rows(tmp_path, drawn):
    """What a top-k memory read is drawn on the rows it came from."""
    read = torch.tensor([[[0.75, 0.25, 0.0]], [[1.0, 0.0, 0.0]]])
    index = torch.tensor([[[4, 0, -1]], [[2, 3, 1]]])
    mk.plots.memory_trace(tmp_path / "rows.png", read, torch.ones(2, 1, 6), index=index)
    assert drawn[0].T.tolist() == [[0.25, 0, 0, 0, 0.75, 0], [0, 0, 1, 0, 0, 0]] and drawn[1].shape == (6, 2)
    with pytest.raises(ValueError, match=r"memory_trace: index: expected torch.int64 \(2, 1, 3\)"):
        mk.plots.memory_trace(tmp_path / "x.png", read, index=index[:, :, :2])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(read=torch.ones(3, 4)), r"memory_trace: read: expected \[T B R N\] or \[T R N\], got shape \(3, 4\)"),
        (dict(sample=2), "memory_trace: sample: expected a sequence of the batch, 0..1, got 2"),
        (dict(rows=(3, 3)), "memory_trace: rows: expected a range in 0..4 that is not empty"),
        (dict(write=torch.ones(0, 2, 1, 4)), "memory_trace: write: expected at least one step"),
        (dict(write=torch.ones(5, 2, 1, 3)), r"memory_trace: write: expected T=5 steps and N=4 rows, as in read, got shape \(5, 2, 1, 3\)"),
    ],
)
def test_errors(change, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        mk.plots.memory_trace(**{"path": tmp_path / "x.png", "read": torch.ones(5, 2, 1, 4), **change})
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"memory_trace needs matplotlib: pip install memkernels\[plot\]"):
        mk.plots.memory_trace(tmp_path / "x.png", torch.ones(5, 2, 1, 4))
