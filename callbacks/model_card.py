"""The page of a model on the hub, written from what the run knows: what it is, how to use it, how it was made."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from callbacks.evaluation_report import HEADER, markdown, markdown_table, settings_line, table_cells
from callbacks.export_pipeline import LORA_FILE

# Settings of data modules that say how a machine got at the data, not what was learnt from.
MACHINE_SETTINGS = (
    "source",
    "validation_source",
    "num_workers",
    "verify_images",
    "streaming",
    "cache",
    "cache_dir",
    "cache_gb",
    "allow_shell_pipes",
)


@dataclass
class ModelFacts:
    """What a model card tells.

    Attributes:
        repo_id: Where the model goes, "owner/name".
        method: Class of the method.
        summary: What the method does, one sentence.
        pipeline: Class of the diffusers pipeline.
        base_model: Hub id of the model that was trained; None where it is not on the hub.
        revision: Of the base model; None for its main one.
        dataset: Hub id of the training data, likewise.
        parts: Other parts that the pipeline was trained with: name -> (diffusers class, subfolder, hub id or None).
        lora_files: Names of the LoRA's files, the one for diffusers first; none of a model with all weights trained.
        license: Identifier of the licence.
        settings: Heading -> name of a setting -> value.
        num_inference_steps: Of the images shown.
        guidance_scale: Of the images shown.
        samples: Prompt and seed of each row of grid.png; empty if there is none.
        results: What `Evaluation` found, its results.json.
        metrics: Last validation metrics.
        versions: Package -> version.
        call: Arguments with which the pipeline of a distilled model is called; empty for others.
        scheduler: Class of the scheduler that a distilled model needs; None for others.
    """

    repo_id: str
    method: str
    summary: str
    pipeline: str
    base_model: str | None
    dataset: str | None
    num_inference_steps: int
    guidance_scale: float
    parts: dict[str, tuple[str, str | None, str | None]] = field(default_factory=dict)
    lora_files: list[str] = field(default_factory=list)
    revision: str | None = None
    license: str | None = None
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    samples: list[tuple[str, int]] = field(default_factory=list)
    results: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: str | None = None


def model_card(facts: ModelFacts) -> str:
    """README.md of a model repository: metadata for the hub, then the page.

    Users' words (prompts, names, paths) are escaped: in the metadata as YAML, on the page as Markdown and HTML.
    """
    from huggingface_hub import ModelCardData

    tag = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", facts.method).lower()
    kind = "LoRA" if facts.lora_files else "fine-tuned model"
    data = ModelCardData(
        base_model=facts.base_model,
        base_model_relation=("adapter" if facts.lora_files else "finetune") if facts.base_model else None,
        datasets=[facts.dataset] if facts.dataset else None,
        library_name="diffusers",
        license=facts.license,
        pipeline_tag="text-to-image",
        tags=["text-to-image", *(["lora"] if facts.lora_files else []), "preference-alignment", tag],
    )
    base = "a model that is not on the hub"
    if facts.base_model is not None:
        base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    page = [f"# {markdown(facts.repo_id.split('/')[-1])}", ""]
    page += [f"A {kind} of {base}, trained with {facts.method}. {markdown(facts.summary)}", ""]
    if facts.license is None:
        page += ["No licence is stated; that of the base model applies to what is made of it.", ""]
    if facts.samples:
        page += ["![Base beside trained model](grid.png)", ""]
        page += [f"{facts.num_inference_steps} steps, guidance {facts.guidance_scale:g}, from top to bottom:", ""]
        page += [*markdown_table(["prompt", "seed"], [[prompt, str(seed)] for prompt, seed in facts.samples]), ""]
    if facts.call:
        page += [
            f"Distilled to {facts.call['num_inference_steps']} steps without guidance: sample as below, with the "
            "scheduler of this repository, whose steps are the trained ones. Other numbers of steps, schedulers or "
            "guidance were not trained.",
            "",
        ]
    page += ["## Use", "", "With [diffusers](https://github.com/huggingface/diffusers):", ""]
    page += ["```python", *usage(facts), "```", ""]
    for file in facts.lora_files:
        if file != LORA_FILE:
            page += [
                f"With ComfyUI: put `{file}` into `models/loras` and choose it in a LoraLoaderModelOnly node (the text "
                "encoders were not trained), strength 1. A1111 and sd-scripts read this file as well.",
                "",
            ]
    page += ["## Results", ""]
    if facts.results is not None:
        page += [f"{markdown(settings_line(facts.results))} A win rate counts images at equal prompts and seeds.", ""]
        page += [*markdown_table(HEADER, table_cells(facts.results)), ""]
    if facts.metrics:
        page += ["Last validation:", ""]
        rows = [[name, f"{value:.5g}"] for name, value in sorted(facts.metrics.items())]
        page += [*markdown_table(["metric", "value"], rows), ""]
    if facts.results is None and not facts.metrics:
        page += ["Nothing was measured.", ""]
    page += ["## Training", ""]
    for heading, settings in facts.settings.items():
        rows = [[name, markdown(value)] for name, value in settings.items()]
        page += [*markdown_table([heading, "value"], rows), ""]
    page += [", ".join(f"{package} {version}" for package, version in facts.versions.items()) + "."]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(page) + "\n"


def usage(facts: ModelFacts) -> list[str]:
    """Lines of Python that draw the first of the samples."""
    parts = facts.parts if facts.lora_files else {}  # a whole pipeline brings its own
    scheduler = {facts.scheduler} if facts.scheduler and facts.lora_files else set()
    classes = sorted({facts.pipeline, *scheduler, *(part[0] for part in parts.values())}, key=str.lower)
    base = (facts.base_model or "path/to/the/base/model") if facts.lora_files else facts.repo_id
    lines = ["import torch", f"from diffusers import {', '.join(classes)}", ""]
    arguments = [repr(base), "dtype=torch.float16"]
    if facts.lora_files and facts.revision is not None:
        arguments.append(f"revision={facts.revision!r}")
    for name, (part_class, subfolder, path) in parts.items():
        where = repr(path or f"path/to/the/{name}") + (f", subfolder={subfolder!r}" if subfolder else "")
        lines.append(f"{name} = {part_class}.from_pretrained({where}, dtype=torch.float16)")
        arguments.append(f"{name}={name}")
    lines.append(f'pipeline = {facts.pipeline}.from_pretrained({", ".join(arguments)}).to("cuda")')
    if facts.lora_files:
        lines.append(f"pipeline.load_lora_weights({facts.repo_id!r}, weight_name={facts.lora_files[0]!r})")
    for name in scheduler:
        lines.append(f'pipeline.scheduler = {name}.from_pretrained({facts.repo_id!r}, subfolder="scheduler")')
    prompt, seed = facts.samples[0] if facts.samples else ("a lighthouse on a cliff at sunset", 0)
    if facts.scheduler == "FlowMatchLCMScheduler":
        lines.append(f"torch.manual_seed({seed})  # the noise between the steps comes from here")
    call = facts.call or {"num_inference_steps": facts.num_inference_steps, "guidance_scale": facts.guidance_scale}
    return [
        *lines,
        "image = pipeline(",
        f"    {prompt!r},",
        *(
            f"    {name}={value:g}," if isinstance(value, float) else f"    {name}={value!r},"
            for name, value in call.items()
        ),
        f"    generator=torch.Generator().manual_seed({seed}),",
        ").images[0]",
        'image.save("image.png")',
    ]


def hub_id(path: Any) -> str | None:
    """A path if it is the id of a repository on the hub, "owner/name"; None for folders, files, URLs and the rest."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(path, str) or path.count("/") != 1 or Path(path).exists():
        return None
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    return path


def shown(value: Any) -> str | None:
    """A setting as text; None for what is unset, too large to show, or could tell something about the machine.

    Args:
        value: As in a resolved config: a number, a word, a list of them, or a class with its arguments.
    """
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w .,+-]*", value) and not value.startswith(".") else hub_id(value)
    if isinstance(value, list | tuple | set) and value:
        items = [shown(item) for item in value]
        return None if None in items else " ".join(items)
    if isinstance(value, dict) and "class_path" in value:
        return f"{value['class_path'].split('.')[-1]}({', '.join(named(value.get('init_args') or {}))})"
    return None


def named(arguments: dict[str, Any]) -> list[str]:
    """What can be shown of a class's arguments, as name=value; switches that are off are left out."""
    texts = {name: shown(value) for name, value in arguments.items() if value is not False}
    return [f"{name}={text}" for name, text in texts.items() if text is not None]
