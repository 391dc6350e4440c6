"""Our drop-in modules on the inputs and the bad inputs that PyTorch tests its own modules with."""

import copy
import pickle
import re
import warnings

import pytest
import torch

from memkernels import nn

common_modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)
NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "MultiheadAttention")
OURS = {getattr(torch.nn, name): getattr(nn, name) for name in NAMES}
INFOS = [info for info in common_modules.module_db if info.module_cls in OURS]
assert len(INFOS) >= len(OURS)


def build(module, case, training):
    torch.manual_seed(0)
    return module(*case.constructor_input.args, **case.constructor_input.kwargs).double().train(training)


def total(outputs):
    if outputs is None:
        return 0
    return outputs.sum() if torch.is_tensor(outputs) else sum(total(o) for o in outputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_same_results(info, training):
    cases = info.module_inputs_func(info, "cpu", torch.float64, True, training)
    assert cases
    for case in cases:
        if case.forward_input is None:
            continue
        results = []
        for module in (info.module_cls, OURS[info.module_cls]):
            layer = build(module, case, training)
            torch.manual_seed(1)
            forward = copy.deepcopy(case.forward_input)
            output = layer(*forward.args, **forward.kwargs)
            total(output).backward()
            results.append((output, {name: p.grad for name, p in layer.named_parameters()}))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("info", [i for i in INFOS if i.module_cls in (torch.nn.RNN, torch.nn.GRU)], ids=lambda info: info.name)
def test_same_results_packed(info):
    cases = info.module_inputs_func(info, "cpu", torch.float64, False, True, with_packed_sequence=True)
    packed = [case for case in cases if hasattr(case.forward_input.args[0], "batch_sizes")]
    assert packed
    for case in packed:
        results = []
        for module in (info.module_cls, OURS[info.module_cls]):
            layer = build(module, case, True)
            output, state = layer(*case.forward_input.args)
            (output.data.sum() + state.square().sum()).backward()
            results.append((output, state, [p.grad for p in layer.parameters()]))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", NAMES)
def test_factory_arguments_and_pickle(name):
    """What torch's test_modules.py checks of every module: device and dtype reach all parameters; a pickle is the same module."""
    args = (6, 2) if name == "MultiheadAttention" else (5, 7)
    layer = getattr(nn, name)(*args, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
    real = torch.nn.utils.skip_init(getattr(nn, name), *args, dtype=torch.float64)
    real.load_state_dict(getattr(torch.nn, name)(*args, dtype=torch.float64).state_dict())
    again = pickle.loads(pickle.dumps(real))
    assert repr(again) == repr(real)
    torch.testing.assert_close(again.state_dict(), real.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("info", [i for i in INFOS if i.module_error_inputs_func], ids=lambda info: info.name)
def test_same_errors(info):
    for error in info.module_error_inputs_func(info, "cpu", torch.float32, True, True):
        case = error.module_error_input
        with warnings.catch_warnings(), pytest.raises(error.error_type, match=error.error_regex) as caught:
            warnings.simplefilter("ignore")
            layer = OURS[info.module_cls](*case.constructor_input.args, **case.constructor_input.kwargs)
            layer(*case.forward_input.args, **case.forward_input.kwargs)
        assert re.search(error.error_regex, str(caught.value))
