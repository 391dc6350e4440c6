"""A recurrent policy of reinforcement learning: the loop of cell calls with resets, replaced by one call, compared step by step.

An actor plays one step at a time and has to use a cell; the learner goes over the recorded rollout again and again, to compute losses.
Episodes end anywhere in a rollout, so the learner usually runs the actor's loop. Here it is one call, and the state an episode starts
with is learned.

python examples/reset_policy.py
"""

import time

import torch

import memkernels as mk

STEPS, ACTORS, OBSERVATION, HIDDEN, ACTIONS = 128, 8, 32, 128, 4


class Policy(torch.nn.Module):
    """Observations and episode starts to the logits of actions and the value of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = mk.nn.GRU(OBSERVATION, HIDDEN, learned_reset=True)
        self.head = torch.nn.Linear(HIDDEN, ACTIONS + 1)
        torch.nn.init.normal_(self.memory.reset_h_l0, std=0.1)

    def act(self, cell: torch.nn.GRUCell, observation: torch.Tensor, start: torch.Tensor, state: torch.Tensor):
        """One step, as the actor takes it: "B I", bool "B", "B H"."""
        state = cell(observation, torch.where(start[:, None], self.memory.reset_h_l0, state))
        return self.head(state), state

    def step_by_step(self, observations: torch.Tensor, starts: torch.Tensor, state: torch.Tensor):
        """The learner as a loop over the actor's steps."""
        results = []
        for observation, start in zip(observations, starts, strict=True):
            result, state = self.act(self.cell(), observation, start, state)
            results.append(result)
        return torch.stack(results), state

    def forward(self, observations: torch.Tensor, starts: torch.Tensor, state: torch.Tensor):
        """The learner: all steps in one call."""
        outputs, last = self.memory(observations, state[None], reset=starts)
        return self.head(outputs), last[0]

    def cell(self) -> torch.nn.GRUCell:
        """A cell with the weights of the layer, not copies of them."""
        cell = mk.nn.GRUCell(OBSERVATION, HIDDEN, device="meta")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(cell, name, getattr(self.memory, f"{name}_l0"))
        return cell


def gradients(policy: Policy, call, rollout) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], float]:
    """Results, gradients of a loss to all parameters, milliseconds forward and backward."""
    begin = time.perf_counter()
    results, state = call(*rollout)
    loss = -results[..., :ACTIONS].log_softmax(-1)[..., 0].mean() + results[..., ACTIONS].square().mean()
    found = torch.autograd.grad(loss, list(policy.parameters()))
    return results.detach(), state.detach(), list(found), 1e3 * (time.perf_counter() - begin)


def main() -> None:
    torch.manual_seed(0)
    policy = Policy()
    rollout = torch.randn(STEPS, ACTORS, OBSERVATION), torch.rand(STEPS, ACTORS) < 0.05, torch.randn(ACTORS, HIDDEN)
    print(f"{STEPS} steps of {ACTORS} actors, {int(rollout[1].sum())} episodes start in them")
    found = {}
    for name, call in (("one cell call a step", policy.step_by_step), ("one call", policy)):
        gradients(policy, call, rollout)
        runs = [gradients(policy, call, rollout) for _ in range(5)]
        found[name] = runs[0]
        print(f"{name}: {sorted(run[3] for run in runs)[2]:.1f} ms forward and backward")
    (loop, loop_state, loop_gradients, _), (ours, state, ours_gradients, _) = found.values()
    for t in range(STEPS):
        torch.testing.assert_close(ours[t], loop[t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, loop_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours_gradients, loop_gradients, rtol=1e-3, atol=1e-5)
    print(f"equal at every step (largest difference {(ours - loop).abs().max().item():.1e}), and so are all gradients")


if __name__ == "__main__":
    main()
