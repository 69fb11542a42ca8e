"""Usage: the few lines of a model card that load the folder and ask it something.

In: a recipe, and whether the folder holds an adapter. Out: Markdown.
Invariant: the code runs as it stands, in the folder, with transformers (and peft) alone; a model that they
would load wrongly gets our own command instead.
Trade-off: one text is asked, in the form that was trained, rather than that every option is shown.
"""

from __future__ import annotations

from sftcore.config import Recipe
from sftcore.data.wording import PromptOptions
from sftcore.tasks import TASKS

ASKED = {
    "question": "What is the capital of France?",
    "subject": "France",
    "a": "How old are you?",
    "b": "What is your age?",
}
ANSWERS = ("answer", "label")  # of the completion, which is not asked
GENERATES = """\
```python
from {library} import {loader}
from transformers import AutoTokenizer

folder = "."  # this folder, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = {loader}.from_pretrained(folder{trust})
{inputs}
output = model.generate(**inputs, max_new_tokens={num_tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
CLASSIFIES = """\
```python
from {library} import {loader}
from transformers import AutoTokenizer

folder = "."  # this folder, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = {loader}.from_pretrained(folder{options}{trust})
inputs = tokenizer({texts}, return_tensors="pt")
print({labels}[int(model(**inputs).logits.argmax())])
```"""
OURS = """\
```bash
sftcore match . --pairs pairs.csv --to scores.jsonl
```

Its classifier is none of transformers' own, which would draw one at random instead of it."""


def usage_of(recipe: Recipe, *, is_peft: bool) -> str:
    """How to load the folder and ask it something."""
    trust = ", trust_remote_code=True" if recipe.model.trust_remote_code else ""
    library = "peft" if is_peft else "transformers"
    if not recipe.classifies:
        loader = "AutoPeftModelForCausalLM" if is_peft else "AutoModelForCausalLM"
        return GENERATES.format(
            library=library,
            loader=loader,
            trust=trust,
            inputs=_inputs(recipe),
            num_tokens=recipe.evaluate.max_new_tokens,
        )
    if not recipe.matching.has_plain_classifier:
        return OURS
    labels = list(recipe.matching.labels.en)
    is_encoder = recipe.architecture == "encoder"
    return CLASSIFIES.format(
        library=library,
        loader=f"Auto{'Peft' if is_peft else ''}ModelForSequenceClassification",
        options=f", num_labels={len(labels)}" if is_peft else "",
        trust=trust,
        texts=f"{ASKED['a']!r}, {ASKED['b']!r}" if is_encoder else repr(_prompt(recipe)),
        labels=labels,
    )


def _inputs(recipe: Recipe) -> str:
    if TASKS[recipe.task].talks:
        chat = [{"role": "user", "content": ASKED["question"]}]
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        return f"messages = {chat!r}\ninputs = tokenizer.apply_chat_template(messages, {options})"
    return f'inputs = tokenizer({_prompt(recipe)!r}, return_tensors="pt")'


def _prompt(recipe: Recipe) -> str:
    """A prompt in the form that was trained; of rows of prompt and completion the question alone."""
    if all(source.format == "jsonl" for source in recipe.data.train):
        return ASKED["question"]
    options = PromptOptions.of(recipe)
    template = options.templates.get("any") or options.templates["en"]
    different, same = recipe.matching.labels.en
    values = ASKED | {"label_0": different, "label_1": same}
    return template.fill(dict.fromkeys(ANSWERS, "") | values)[0]
