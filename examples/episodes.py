"""An LSTM over rollouts of reinforcement learning: episodes start anywhere in a sequence, and one call runs them all.

python examples/episodes.py
"""

import time

import torch

import memkernels as mk


def step_by_step(lstm: torch.nn.LSTM, steps: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """How this is written without `reset`: one call a step, the state multiplied by zero where an episode starts."""
    h = c = steps.new_zeros(1, steps.shape[1], lstm.hidden_size)
    outputs = []
    for x, start in zip(steps, starts, strict=True):
        keep = (~start)[None, :, None]
        output, (h, c) = lstm(x[None], (h * keep, c * keep))
        outputs.append(output)
    return torch.cat(outputs)


def main() -> None:
    torch.manual_seed(0)
    steps, starts = torch.randn(128, 8, 32), torch.rand(128, 8) < 0.01
    theirs = torch.nn.LSTM(32, 128)
    ours = mk.nn.LSTM(32, 128)
    ours.load_state_dict(theirs.state_dict())
    results = {}
    for name, call in (
        ("one call a step", lambda: step_by_step(theirs, steps, starts)),
        ("one call", lambda: ours(steps, reset=starts)[0]),
    ):
        call().sum().backward()
        begin = time.perf_counter()
        results[name] = call()
        results[name].sum().backward()
        print(f"{name}: {1e3 * (time.perf_counter() - begin):.1f} ms forward and backward")
    a, b = results.values()
    print(f"largest difference: {(a - b).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
