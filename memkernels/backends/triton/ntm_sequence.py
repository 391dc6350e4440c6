"""ntm_sequence has no Triton kernel: `nn.NTM` runs the ops of a step on a GPU."""


def supports(*call):
    return "a whole sequence of a Neural Turing Machine has no kernel here; nn.NTM runs the ops of each step"


def forward(*call):
    raise NotImplementedError(supports())


backward = forward
AOT = ()
