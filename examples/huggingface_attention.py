"""memkernels.attention inside Hugging Face transformers: the same outputs and gradients as "eager", on small models with random weights.

python examples/huggingface_attention.py
"""

import sys

import torch

import memkernels as mk

try:
    import transformers
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
except ImportError as error:
    sys.exit(f"this example needs Hugging Face transformers (pip install transformers): {error}")

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "Llama, 4 query heads on 2 key heads": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2)),
    "BERT": (BertModel, BertConfig(**SIZES)),
    "GPT-2": (GPT2LMHeadModel, GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)),
}


def run(kind: type, config: object, weights: dict, implementation: str, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Outputs of the tokens that are no padding, and the gradients of all weights."""
    config._attn_implementation = implementation
    model = kind(config).eval()
    model.load_state_dict(weights)
    torch.manual_seed(1)
    tokens = torch.randint(97, (3, 17))
    output = model(input_ids=tokens, attention_mask=mask)[0]
    kept = output if mask is None else output[mask.bool()]
    (kept * torch.randn(kept.shape)).sum().backward()
    return [kept, *(p.grad for p in model.parameters() if p.grad is not None)]


def main() -> None:
    name = mk.integrations.register_huggingface()
    print(f"transformers {transformers.__version__}, attn_implementation={name!r}")
    padding = torch.ones(3, 17, dtype=torch.long)
    padding[1, 11:] = 0
    padding[2, :4] = 0
    worst = 0.0
    for title, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        weights = kind(config).state_dict()
        for case, mask in (("no mask", None), ("padding", padding)):
            eager, fused = (run(kind, config, weights, implementation, mask) for implementation in ("eager", name))
            error = max((a - b).abs().max().item() / max(a.abs().max().item(), 1e-3) for a, b in zip(eager, fused, strict=True))
            worst = max(worst, error)
            print(f"{title}, {case}: {len(eager) - 1} gradients, largest relative difference {error:.1e}")
    if worst > 1e-4:
        sys.exit(f"differs from eager by {worst:.1e}")


if __name__ == "__main__":
    main()
