"""Stage 3: Hierarchy Enhanced Policy Optimization (GPR, arXiv 2511.10138, Eq. 8 to 10). Pure functions over candidates laid end to end.

A candidate is a semantic ID sampled for a request; the candidates of one request are a group. Levels count from 1 to L in the formulas,
column l - 1 of a tensor is level l. Rewards come from `gpr_dist/rl`, log-probabilities and values from the model.
"""

import torch
from torch import Tensor

# N candidates of all requests  R requests (groups)  L levels

EPSILON = 1e-6  # of Eq. 8, in units of the scaled reward
MAX_LOG_RATIO = 20.0  # keeps exp() finite; far outside any clip range


def group_mean_std(reward_N: Tensor, group_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of the population) of each group [R]; 0 and 0 where it is empty."""
    count_R = torch.bincount(group_N, minlength=num_groups).clamp_min(1).to(reward_N.dtype)
    mean_R = torch.zeros_like(count_R).index_add_(0, group_N, reward_N) / count_R
    centred_N = reward_N - mean_R.index_select(0, group_N)
    return mean_R, (torch.zeros_like(count_R).index_add_(0, group_N, centred_N.square()) / count_R).sqrt()


def z_scores(reward_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """(R - mean) / (std + epsilon) within each group (Eq. 8, l = L); 0 where a group's rewards are equal."""
    mean_R, std_R = group_mean_std(reward_N, group_N, num_groups)
    return (reward_N - mean_R.index_select(0, group_N)) / (std_R.index_select(0, group_N) + EPSILON)


def is_constant(reward_N: Tensor, group_N: Tensor, num_groups: int, tolerance: float = 1e-6) -> Tensor:
    """Groups whose rewards tell no candidate from another (or that have one), bool [R]. Args: tolerance: relative to the largest one."""
    low_R = reward_N.new_full((num_groups,), torch.inf).scatter_reduce(0, group_N, reward_N, "amin")
    high_R = reward_N.new_full((num_groups,), -torch.inf).scatter_reduce(0, group_N, reward_N, "amax")
    return ~(high_R - low_R > tolerance * torch.maximum(low_R.abs(), high_R.abs()))


def hepo_advantages(terminal_N: Tensor, process_Nl: Tensor, value_NL: Tensor, group_N: Tensor, num_groups: int, gamma: float,
                    lam: float, is_choice_NL: Tensor | None = None) -> Tensor:
    """Advantages of every level [N, L] (Eq. 8).

        delta_l = r_l + gamma V(s, z_1..l) - V(s, z_1..l-1)
        A_l = sum_{k=0}^{L-l-1} (gamma lam)^k delta_{l+k}   for l < L;     A_L = (R - mean) / (std + epsilon) over the request's candidates

    Args:
        terminal_N: R, in units of the reward's scale. process_Nl: r_1 .. r_{L-1} [N, L-1], the same units.
        value_NL: V(s), V(s, z_1), .. V(s, z_1..L-1): column l - 1 is the value before the code of level l; detached by the caller.
        is_choice_NL: bool, whether several codes were legal. A path's L is its last choice: where the first codes leave a single ad, the
            codes after them are forced, have no gradient and get 0, and what the ad earned would reach nobody. None = all are choices.
    Differs from the paper: it is silent on forced codes; PAPER.md.
    """
    last_N = torch.full_like(group_N, value_NL.shape[1] - 1)
    if is_choice_NL is not None:
        level_L = torch.arange(value_NL.shape[1], device=group_N.device)
        last_N = torch.where(is_choice_NL, level_L, 0).amax(1)
    z_N, running_N = z_scores(terminal_N, group_N, num_groups), torch.zeros_like(terminal_N)
    advantages = [torch.where(last_N == value_NL.shape[1] - 1, z_N, 0.0)]
    delta_Nl = process_Nl + gamma * value_NL[:, 1:] - value_NL[:, :-1]
    for level in range(value_NL.shape[1] - 2, -1, -1):
        running_N = torch.where(level < last_N, delta_Nl[:, level] + gamma * lam * running_N, 0.0)
        advantages.insert(0, torch.where(level == last_N, z_N, running_N))
    return torch.stack(advantages, 1)


def grpo_advantages(terminal_N: Tensor, num_levels: int, group_N: Tensor, num_groups: int) -> Tensor:
    """The group's z-score of the terminal reward at every level [N, L] (GRPO, 2402.03300): HEPO without levels and critic."""
    return z_scores(terminal_N, group_N, num_groups)[:, None].expand(-1, num_levels)


def returns(terminal_N: Tensor, process_Nl: Tensor, gamma: float) -> Tensor:
    """G_l = sum_{k >= l} gamma^(k-l) r_k with r_L = R [N, L]: what V(s, z_1..l-1) is regressed on (Eq. 10)."""
    running_N = terminal_N
    columns = [running_N]
    for reward_N in reversed(process_Nl.unbind(1)):
        running_N = reward_N + gamma * running_N
        columns.insert(0, running_N)
    return torch.stack(columns, 1)


def policy_ratios(log_p_NL: Tensor, old_log_p_NL: Tensor) -> Tensor:
    """rho_l = pi / pi_old of the chosen code at each level [N, L]; exactly 1 where the two are the same number."""
    return (log_p_NL - old_log_p_NL).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_loss(log_p_NL: Tensor, old_log_p_NL: Tensor, advantage_NL: Tensor, level_weight_L: Tensor, clip: float, counts_N: Tensor,
                num_candidates: float) -> Tensor:
    """Clipped surrogate of every level (Eq. 9), as a loss.

        loss = - sum_n sum_l c_l min(rho_l A_l, clip(rho_l, 1 - eps, 1 + eps) A_l) / num_candidates

    Args:
        log_p_NL, old_log_p_NL: log pi and log pi_old of the candidate's codes, both over the codes legal at the request; nats.
        level_weight_L: c_l. counts_N: bool, candidates of groups that count.
        num_candidates: those that count in the whole step, over all ranks and micro-batches, so that the shares of a step add up.
    Differs from the paper: divided by num_candidates; PAPER.md.
    """
    ratio_NL = policy_ratios(log_p_NL, old_log_p_NL)
    gain_NL = torch.minimum(ratio_NL * advantage_NL, ratio_NL.clamp(1 - clip, 1 + clip) * advantage_NL)
    return -((gain_NL * level_weight_L).sum(1) * counts_N).sum() / num_candidates


def clipped_share(log_p_NL: Tensor, old_log_p_NL: Tensor, advantage_NL: Tensor, clip: float, counts_N: Tensor) -> Tensor:
    """How many (candidate, level) pairs have no policy gradient because the ratio left the clip range on the side the advantage pushes to.

    Returns: their number, to be divided by levels times the candidates that count.
    """
    ratio_NL = policy_ratios(log_p_NL, old_log_p_NL)
    outside_NL = ((ratio_NL > 1 + clip) & (advantage_NL > 0)) | ((ratio_NL < 1 - clip) & (advantage_NL < 0))
    return (outside_NL & counts_N[:, None]).sum()


def critic_loss(value_NL: Tensor, return_NL: Tensor, counts_N: Tensor, num_candidates: float) -> Tensor:
    """sum_n sum_l (V(s, z_1..l-1) - G_l)^2 / num_candidates (Eq. 10). Args: as in `returns` and `policy_loss`."""
    return ((value_NL - return_NL).square().sum(1) * counts_N).sum() / num_candidates


def group_log_softmax(log_p_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """log of the policy renormalised over the candidates of each group [N]. Args: log_p_N: of whole paths."""
    largest_R = log_p_N.new_full((num_groups,), -torch.inf).scatter_reduce(0, group_N, log_p_N.detach(), "amax")
    shifted_N = log_p_N - largest_R.index_select(0, group_N)
    total_R = log_p_N.new_zeros(num_groups).index_add(0, group_N, shifted_N.exp())
    return shifted_N - total_R.clamp_min(torch.finfo(log_p_N.dtype).tiny).log().index_select(0, group_N)


def group_kl(log_p_N: Tensor, reference_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """KL(pi || reference) of the two policies renormalised over the candidates of each group, nats >= 0 [R]; differentiable in pi.

    Bounded where one candidate's probability has all but vanished, which the usual estimators from single ratios are not.
    """
    mine_N, theirs_N = (group_log_softmax(x, group_N, num_groups) for x in (log_p_N, reference_N))
    return log_p_N.new_zeros(num_groups).index_add(0, group_N, mine_N.exp() * (mine_N - theirs_N))
