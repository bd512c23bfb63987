"""Direct Preference Optimization (2305.18290), the baseline of GPR's Table 3: the best candidate of a request against its worst one."""

import torch
import torch.nn.functional as F
from torch import Tensor

# N candidates of all requests  R requests  Q pairs


def best_and_worst(reward_N: Tensor, group_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Candidates with the largest and the smallest reward of each group (the first among equals), int64 [Q]; empty groups have none."""
    number_N = torch.arange(len(group_N), device=group_N.device)
    picked = []
    for score_N, reduce in ((reward_N, "amax"), (reward_N, "amin")):
        extreme_R = score_N.new_zeros(num_groups).scatter_reduce(0, group_N, score_N, reduce, include_self=False)
        at_N = torch.where(score_N == extreme_R.index_select(0, group_N), number_N, len(group_N))
        first_R = number_N.new_full((num_groups,), len(group_N)).scatter_reduce(0, group_N, at_N, "amin")
        picked.append(first_R[first_R < len(group_N)])
    return picked[0], picked[1]


def dpo_loss(log_p_best_Q: Tensor, log_p_worst_Q: Tensor, reference_best_Q: Tensor, reference_worst_Q: Tensor, beta: float,
             num_pairs: float) -> Tensor:
    """- sum_q log sigmoid(beta ((log pi - log ref)(best) - (log pi - log ref)(worst))) / num_pairs.

    Args: log-probabilities of whole paths, nats. num_pairs: of the whole step, over all ranks and micro-batches.
    """
    margin_Q = (log_p_best_Q - reference_best_Q) - (log_p_worst_Q - reference_worst_Q)
    return -F.logsigmoid(beta * margin_Q).sum() / num_pairs
