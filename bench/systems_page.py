"""The page of systems, from what `bench.systems` wrote and this list. A unit test renders it again, and finds every module,
test and verb that an entry names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.evidence import ROOT, nats, paragraphs, ran

PAGE = ROOT / "docs/explanation/systems.md"
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class System:
    """One system: `says` what its paper claims, `reach` how a user comes to it, `oracle` tests as file::name, `left` what is
    not here, `effect` the sentence on what was measured."""

    name: str
    paper: str
    says: str
    module: str
    reach: str
    oracle: str
    effect: Callable[[Figures], str] | str
    left: str = ""


def _cost(figures: Figures, key: str) -> str:
    return nats(figures[f"cost {key}"])


def _saved(figures: Figures, key: str) -> str:
    return nats(figures[key])


EXPERTS, MOE = "tests/unit/connito/experts", "tests/unit/connito/moe"
SELECTION = "how much the selected experts gain over others is on the page of [evidence](evidence.md)."
SYSTEMS = (
    System(
        "ESFT", "Wang et al. 2024", "the experts that a task's tokens use are enough to train",
        "shared/connito/moe/selection.py", "connito select --method esft-token|esft-gate",
        f"{MOE}/test_selection.py::test_gate_scores_are_rounded_and_summed_as_published",
        "all published sets for DeepSeek-V2-Lite are reproduced, in order, where its traces are at hand; " + SELECTION,
    ),
    System(
        "DiLoCo", "Douillard et al. 2023", "workers that meet now and then, and step on with Nesterov, do as one",
        "shared/connito/protocol/merging/aggregators.py", "connito up",
        "tests/unit/connito/protocol/merging/test_aggregators.py::test_the_outer_step_is_torchs_nesterov",
        "what is kept of one machine's gain, by data, miners and steps between merges: [evidence](evidence.md).",
        "each expert is averaged by the tokens that miners sent to it; the first moment begins anew in every cycle.",
    ),
    System(
        "TIES", "Yadav et al. 2023", "merging what is large and agrees in sign loses less than averaging",
        "shared/connito/experts/compose.py", "connito library compose --method ties --density",
        f"{EXPERTS}/test_compose.py::test_ties_on_numbers_worked_by_hand",
        "see [the library](library.md#composition).",
    ),
    System(
        "Arrow", "Ostapenko et al. 2024", "tokens find their module, untrained, by the direction that it moves most",
        "shared/connito/experts/arrow.py", "connito library route --method arrow",
        f"{EXPERTS}/test_arrow.py::test_the_prototype_of_a_rank_one_change_is_its_input_direction",
        "see [the library](library.md#composition).",
    ),
    System(
        "LoRAHub", "Huang et al. 2023", "few examples and a search without gradients mix modules for a new task",
        "shared/connito/experts/lorahub.py", "connito library compose --learn",
        f"{EXPERTS}/test_learned.py::test_the_optimum_of_a_synthetic_loss_is_found_without_gradients",
        lambda f: f"of a synthetic loss over 20 experts {100 * f['lorahub'][0]:.0f} % of what can be saved is.",
        "its penalty of 0.05 is 0.001 here: expert deltas save hundredths of a nat.",
    ),
    System(
        "FlexOlmo", "Shi et al. 2025", "experts trained apart beside one frozen anchor join and leave without training",
        "shared/connito/experts/flex.py", "connito library grow",
        f"{EXPERTS}/test_every_family.py::test_the_joined_layer_is_flexolmos",
        lambda f: f"three additions joined save {_saved(f, 'flex saved')} on their domains.",
        "rows start from hidden states instead of a text encoder's embedding, and have no trained negative bias.",
    ),
    System(
        "BAR", "Morrison et al. 2026", "experts pass their own training beside an anchor, and one is upgraded without the others",
        "shared/connito/experts/flex.py", "connito library join --router-steps",
        f"{EXPERTS}/test_growing.py::test_routers_are_trained_over_all_additions_at_the_end_and_an_upgrade_leaves_the_others",
        lambda f: f"training the routers at the end changes the joined model's loss by {_saved(f, 'router training')}.",
        "shared parameters stay frozen: embeddings and attention of the anchor are never trained and averaged.",
    ),
    System(
        "BTX", "Sukhbaatar et al. 2024", "dense branches become the experts of one MoE, which is then trained",
        "shared/connito/base/branches.py", "connito library branches --router-steps",
        f"{EXPERTS}/test_branches.py::test_experts_are_the_branches_mlps_and_the_rest_their_mean",
        lambda f: f"three branches joined save {_saved(f, 'btx joined')}, with trained routers {_saved(f, 'btx routed')}.",
        "seeds are Llama-like.",
    ),
    System(
        "Branch-Train-Merge", "Li et al. 2022", "an ensemble of domain models, or their mean, beats the seed",
        "shared/connito/base/btm.py", "connito library branches --moe-layers 0",
        f"{EXPERTS}/test_branches.py::test_the_ensemble_is_bayes_rule_token_by_token",
        lambda f: f"the ensemble saves {_saved(f, 'btm ensemble')}, the mean of the parameters {_saved(f, 'btm mean')}.",
        "the ensemble is measured; what is written is the mean.",
    ),
    System(
        "MBC", "Ostapenko et al. 2024", "experts of similar tasks are clustered and one is trained for each group",
        "shared/connito/experts/mbc.py", "connito library cluster --text",
        f"{EXPERTS}/test_mbc.py::test_similarities_are_cosines_of_the_larger_halves",
        lambda f: f"training for a group ends {_saved(f, 'mbc gain')} below merging its members.",
    ),
    System(
        "MoLoRA", "Zadouri et al. 2023", "a router mixes modules token by token inside every linear map",
        "shared/connito/experts/arrow.py", "connito library route --method molora",
        f"{EXPERTS}/test_arrow.py::test_a_layer_mixes_inside_every_map_token_by_token",
        "see [the library](library.md#composition).",
        "variants are full rows, not vectors or low-rank maps.",
    ),
    System(
        "NAEE", "Lu et al. 2024", "experts are left out by their layer's error, and skipped token by token",
        "shared/connito/experts/token_skipping.py", "connito library skip",
        f"{EXPERTS}/test_token_skipping.py::test_naee_skips_the_second_expert_below_beta_and_shares_out_anew",
        lambda f: (
            f"six of sixteen experts cost {_cost(f, 'naee')}; skipping {100 * f['skipped'][0]:.0f} % of the slots costs "
            f"{_cost(f, 'skipping')}."
        ),
    ),
    System(
        "Expert Choice", "Zhou et al. 2022", "experts that choose tokens are loaded evenly",
        "shared/connito/experts/token_skipping.py", "connito library skip --capacity",
        f"{EXPERTS}/test_token_skipping.py::test_every_expert_takes_the_tokens_that_score_it_best",
        lambda f: f"two experts a token on average, on a base that was trained otherwise: {_cost(f, 'expert choice')}.",
        "no model is trained with it, and it cannot generate: later tokens take part in the choice.",
    ),
    System(
        "MoE-I²", "Yang et al. 2024", "pruning ratios by layer, a genetic search, then low-rank experts",
        "shared/connito/experts/genetic.py", "connito library prune --method moe-i2 --share --steps",
        f"{EXPERTS}/test_tuning.py::test_recovery_is_lora_on_the_factors",
        lambda f: (
            f"six of sixteen experts cost {_cost(f, 'moe-i2')}; with half of the numbers of what stays "
            f"{_cost(f, 'moe-i2, low rank')}, after LoRA on the factors {_cost(f, 'moe-i2, recovered')}."
        ),
        "gate and up are factorised together; LoRA trains experts alone.",
    ),
    System(
        "MoE-Pruner", "Xie et al. 2024", "weights are pruned by magnitude, input and gate; experts are distilled back",
        "shared/connito/experts/tuning.py", "connito library prune --method zeros --steps",
        f"{EXPERTS}/test_tuning.py::test_the_distance_of_experts_is_the_papers",
        lambda f: f"three quarters zero cost {_cost(f, 'zeros')}, after distillation {_cost(f, 'zeros, distilled')}.",
    ),
    System(
        "Task-specific pruning", "Chen et al. 2022", "experts go window by window of fine-tuning, to one dense model",
        "shared/connito/experts/prune.py", "connito library prune --method task --steps",
        f"{EXPERTS}/test_tuning.py::test_the_schedule_is_that_of_accumulated_gate_shares",
        lambda f: (
            f"one expert a layer costs {_cost(f, 'one expert')}, tuned on the way {_cost(f, 'one expert, tuned')}; as a dense "
            f"model its loss differs by {f['dense differs'][0]:.3f}."
        ),
        "only experts are fine-tuned; five windows in the first half of the steps, thresholds linear in them.",
    ),
    System(
        "Driver experts", "Hu et al. 2026", "a few experts cause the output; more weight on them helps their domain",
        "shared/connito/experts/steering.py", "connito library steer",
        f"{EXPERTS}/test_steering.py::test_drivers_are_those_without_whose_gate_the_output_changes_most",
        lambda f: f"four raised drivers change the loss by {_cost(f, 'steering')}, at the factor that calibration chose.",
    ),
    System(
        "MoE Lens", "Chaudhari et al. 2026", "the first expert's output is near that of all, layer by layer",
        "shared/connito/moe/lens.py", "connito select --diagnostics",
        f"{MOE}/test_lens.py::test_it_is_what_the_model_would_say_if_it_ended_there",
        lambda f: (
            f"with the first expert alone in a layer hidden states have a cosine of {f['lens cosine'][0]:.3f} to those of all; "
            f"{100 * f['lens agreement'][0]:.0f} % of the words said behind it stay."
        ),
    ),
    System(
        "DES-MoE", "Li et al. 2025", "an adaptive router, a map of experts by domain and three phases adapt many domains at once",
        "shared/connito/experts/des_moe.py", "connito.experts.des_moe.adapt",
        f"{EXPERTS}/test_des_moe.py::test_the_map_the_mask_and_the_distance_are_the_papers",
        lambda f: (
            f"three domains at once save {_saved(f, 'des-moe saved')} and cost a fourth {_saved(f, 'des-moe forgot')}, "
            f"training all experts and routers {_saved(f, 'everything saved')} and {_saved(f, 'everything forgot')}. "
            f"As linear routers, which transformers loads, adaptive ones are {_saved(f, 'folding costs')} worse."
        ),
        "shared parameters are frozen in all phases; how the weight of distillation falls, and where phases end, is our reading. "
        "A run's router never moves, so that this makes a base; `connito select --method des-moe` has the map for runs.",
    ),
    System(
        "FFT-MoE", "Hu et al. 2025", "clients of different means train with routers and numbers of experts of their own",
        "shared/connito/moe/personal.py", "CONNITO_TOP_K",
        f"{MOE}/test_personal.py::test_own_routers_and_their_loss_are_the_papers",
        lambda f: (
            f"three clients of one domain each save {_saved(f, 'clients own')} with routers of their own and "
            f"{_saved(f, 'clients shipped')} without, a difference of {_saved(f, 'clients gain')}. In a run, "
            f"where the shipped router is what counts, an own one in the first half of a cycle's "
            f"steps adds {_saved(f, 'own router saved')}, and one expert a "
            f"token instead of two costs {_cost(f, 'one expert a token')}."
        ),
        "experts are the base's own, not adapters beside it; how the balance loss follows heterogeneity is our reading.",
    ),
    System(
        "BTS", "Zhang et al. 2025", "stitches between a frozen seed and frozen specialists make them one generalist",
        "shared/connito/base/bts.py", "connito.base.bts.Stitched",
        "tests/unit/connito/base/test_stitched.py::test_a_stitch_into_the_hub_is_the_papers_mixture",
        lambda f: (
            f"three branches stitched after every layer save {_saved(f, 'bts')} once stitches are trained, "
            f"{_saved(f, 'bts begun')} before."
        ),
        "no checkpoint of transformers holds it; the forms of the gates are our reading.",
    ),
    System(
        "BAM", "Zhang et al. 2024", "attention of dense branches becomes experts too, mixed softly",
        "shared/connito/base/bam.py", "connito.base.bam.mix_branches",
        "tests/unit/connito/base/test_stitched.py::test_attention_is_the_soft_mixture_of_all_branches",
        lambda f: (
            f"three branches with their attention save {_saved(f, 'bam')} after training all of it, "
            f"{_saved(f, 'bam begun')} before; joined as in BTX, with averaged attention, "
            f"{_saved(f, 'btx whole')} after the same training."
        ),
        "no checkpoint of transformers holds it; attention and MLP in sequence, as in the seed, not side by side.",
    ),
    System(
        "Residual-MoE", "Rajbhandari et al. 2022", "a dense MLP for every token and an expert that corrects it do as two experts",
        "shared/connito/base/residual.py", "connito base build --residual",
        "tests/unit/connito/base/test_residual.py::test_a_layer_is_the_dense_mlp_and_the_scored_correction",
        lambda f: (
            f"trained for the same steps, corrections beside dense MLPs save {_saved(f, 'residual saved')}, copies of the MLPs "
            f"{_saved(f, 'copies saved')}."
        ),
        "made from a dense model, not pretrained; the published code's coefficient weighs both parts, here a gate weighs the "
        "dense one; numbers of experts do not grow with depth.",
    ),
    System(
        "EMO", "Bhagia et al. 2026", "documents held to pools of experts make subsets of experts that work alone",
        "shared/connito/base/emo.py", "connito base build --from tiny-emo",
        "tests/unit/connito/base/test_emo.py::test_pools_are_drawn_and_the_balance_is_the_published_one",
        lambda f: (
            f"a quarter of the experts cost {_cost(f, '25 %, pools')} after training in pools and {_cost(f, '25 %, free')} "
            f"without; an eighth {_cost(f, '12.5 %, pools')} and {_cost(f, '12.5 %, free')}."
        ),
        "a base of half a million parameters, not pretrained from the start, pools of two to four of eight experts.",
    ),
)  # fmt: skip


def render(document: Mapping[str, Any]) -> str:
    """Return the page."""
    figures = document["figures"]
    return paragraphs("\n".join([_HEAD, *(_section(system, figures) for system in SYSTEMS), _tail(document)]))


_HEAD = """# Systems of the literature, and what they do here

Written by `python -m bench.evidence`; do not edit. For each system: what its paper says, where it is and how to reach it, the
test that computes it anew from the formula and compares, what was measured, and what is left out. Figures are means with 95 %
t intervals over the seeds of `bench.systems`: nats per token on held-out text of a tiny base, positive costs are worse.
They compare, and do not carry over to large models as numbers.
"""


def _section(system: System, figures: Figures) -> str:
    effect = system.effect if isinstance(system.effect, str) else system.effect(figures)
    left = f" **Left out:** {system.left}" if system.left else ""
    file, _, name = system.oracle.partition("::")
    return f"""
## {system.name}

{system.paper}: {system.says}.

`{system.reach}` · `{system.module}` · `{file}`, `{name}`

**Here:** {effect}{left}
"""


def _tail(document: Mapping[str, Any]) -> str:
    return f"""
## The run

{ran(document).split("![")[0]}
"""
