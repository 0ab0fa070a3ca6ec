"""Checks of the layout and of the models: idle GPUs, models that fit nowhere or are split needlessly. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from router.doctor.facts import DoctorFacts, ModelFit, Unread
from router.doctor.finding import Check, Outcome, failure, not_checked, note, ok, or_ok, warning

_GIB = 1024**3
_SHOWN_MAX = 5


def idle_gpus(facts: DoctorFacts) -> list[Outcome]:
    """Pitfall 1: a second GPU that nothing uses, and whether that is right."""
    if isinstance(facts.gpus, Unread):
        return not_checked(facts.gpus.reason)
    outcomes = [
        warning(
            f"no instance uses GPU {index}",
            "discover: true   (or name the GPU in instances[].gpus; see llamayard check-config)",
        )
        for index in facts.configuration.uncovered_gpus
    ]
    if outcomes or len(facts.gpus) == 1:
        return or_ok(outcomes, "one GPU, and an instance uses it")
    models = () if isinstance(facts.models, Unread) else facts.models
    if models and all(model.gpus == 1 for model in models):
        return ok("every model fits one GPU: one of them alone leaves the others idle, rightly; several are spread")
    return ok(f"an instance uses each of the {len(facts.gpus)} GPUs")


def fits_by_sum_only(facts: DoctorFacts) -> list[Outcome]:
    """Pitfall 2: out of memory although the sum fits."""
    if isinstance(facts.gpus, Unread) or isinstance(facts.models, Unread):
        return not_checked(_reason(facts))
    total = _total_bytes(facts)
    near = [model for model in facts.models if not model.gpus_min and model.reason and model.needed_bytes <= total]
    outcomes = [
        warning(
            f"{model.name}: needs {model.needed_bytes / _GIB:.1f} of {total / _GIB:.1f} GiB in sum, but {model.reason}",
            _smaller(model),
        )
        for model in near[:_SHOWN_MAX]
    ]
    return or_ok(outcomes, "every model that fits the sum of the GPUs fits them singly too")


def fits_nowhere(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.gpus, Unread) or isinstance(facts.models, Unread):
        return not_checked(_reason(facts))
    total = _total_bytes(facts)
    too_large = [model for model in facts.models if not model.gpus_min and model.needed_bytes > total]
    outcomes = [
        warning(
            f"{model.name}: needs {model.needed_bytes / _GIB:.1f} GiB, all GPUs have {total / _GIB:.1f}",
            _smaller(model),
        )
        for model in too_large[:_SHOWN_MAX]
    ]
    if len(too_large) > _SHOWN_MAX:
        outcomes.append(warning(f"and {len(too_large) - _SHOWN_MAX} models more"))
    return or_ok(outcomes, f"{_count(facts.models)}, none larger than all GPUs together")


def split_in_vain(facts: DoctorFacts) -> list[Outcome]:
    """Pitfall 3: a model over several GPUs that would run faster on one."""
    if isinstance(facts.gpus, Unread) or isinstance(facts.models, Unread):
        return not_checked(_reason(facts))
    outcomes = [
        warning(
            f"{model.name} is pinned to {model.gpus} GPUs, and {model.gpus_min} would hold it: it runs slower",
            f"remove models.{model.name}.layout or .gpus, or pin it to {model.gpus_min}",
        )
        for model in facts.models
        if model.is_pinned and model.gpus > model.gpus_min > 0
    ]
    return or_ok(outcomes, "no model is on more GPUs than it needs")


def layers_on_cpu(facts: DoctorFacts) -> list[Outcome]:
    if isinstance(facts.models, Unread):
        return not_checked(facts.models.reason)
    outcomes = [
        warning(
            f"{model.name}: its Modelfile says num_gpu {model.num_gpu}: of {model.layers + 1} layers "
            f"{model.layers + 1 - model.num_gpu} stay on the CPU, which is many times slower",
            f"ollama show --modelfile {model.name} > Modelfile   (remove PARAMETER num_gpu, then ollama create)",
        )
        for model in facts.models
        if model.num_gpu is not None and 0 <= model.num_gpu <= model.layers and model.layers
    ]
    return or_ok(outcomes, "no Modelfile leaves layers on the CPU")


def configuration(facts: DoctorFacts) -> list[Outcome]:
    """What `check-config` says: keys, pins, TLS files, the state directory."""
    found = facts.configuration
    outcomes = [failure(problem, "llamayard check-config --changed") for problem in found.problems]
    outcomes += [warning(each, "llamayard check-config --changed") for each in found.warnings]
    outcomes += [note(f"not checked: {each}") for each in found.unchecked]
    return or_ok(outcomes, "valid, and no rules contradict each other")


def _smaller(model: ModelFit) -> str:
    if model.context_length_max:
        return f"llamayard plan {model.name} --gpus auto --context {model.context_length_max} --parallel 1"
    return f"llamayard plan {model.name} --gpus auto   (a smaller quantisation, or a q8_0 cache)"


def _total_bytes(facts: DoctorFacts) -> int:
    if isinstance(facts.gpus, Unread):
        return 0
    usable = [each.gpu for each in facts.gpus if each.gpu.error is None]
    return sum(gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0) for gpu in usable)


def _reason(facts: DoctorFacts) -> str:
    return next((each.reason for each in (facts.gpus, facts.models) if isinstance(each, Unread)), "")


def _count(models: Iterable[ModelFit]) -> str:
    number = len(list(models))
    return "1 model" if number == 1 else f"{number} models"


MODEL_CHECKS = (
    Check("idle-gpus", "idle GPUs", "an unused GPU is memory and speed that users do not get", idle_gpus),
    Check("fits-by-sum", "fits the sum only", "each GPU needs 1.5–2.5 GB of its own", fits_by_sum_only),
    Check("models-fit", "models fit", "requests for them get 422 model_too_large", fits_nowhere),
    Check("needless-split", "needless split", "a model that fits one GPU runs faster on one", split_in_vain),
    Check("num-gpu", "num_gpu", "layers on the CPU cost most of the speed", layers_on_cpu),
    Check("configuration", "configuration", "what contradicts itself is refused at start", configuration),
)
