"""From a question to the tokens that a model reads, and those that it should generate."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fvae_lora_experiments.errors import UserError

Template = Literal["alpaca", "chat"]

ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
ALPACA_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""


def check_template(template: Template, tokenizer: Any) -> None:
    """Raises a `UserError` if the tokenizer does not have what the template needs."""
    if template == "chat" and not tokenizer.chat_template:
        raise UserError("commonsense.template: this model's tokenizer has no chat template; alpaca is allowed")


def prompt(instruction: str, more: str, template: Template, tokenizer: Any) -> str:
    """The text after which the answer begins.

    Args:
        instruction: what is asked.
        more: the question's `input`, or empty.
        template: `alpaca` is the prompt commonly used for this benchmark; `chat` is the instruct model's own template.
        tokenizer: the model's tokenizer, which has the template for `chat`.
    """
    if template == "alpaca":
        return (ALPACA_WITH_INPUT if more else ALPACA).format(instruction=instruction, input=more)
    message = {"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction}
    text: str = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return text


def encode(rows: Mapping[str, Sequence[Any]], template: Template, tokenizer: Any) -> dict[str, list[Any]]:
    """Tokens of questions.

    Prompt and answer are tokenized separately, so that the boundary between them is the same in training, scoring and
    generation.

    Args:
        rows: columns of `data.questions`.
        template: see `prompt`.
        tokenizer: the model's.

    Returns:
        `prompt_ids`, a list per question, and `answer_ids`, a list per option of each question, ending with the end
        token.
    """
    texts = [prompt(i, more, template, tokenizer) for i, more in zip(rows["instruction"], rows["input"], strict=True)]
    flat = [text for answers in rows["answers"] for text in answers]
    ended = iter([[*ids, tokenizer.eos_token_id] for ids in tokenizer(flat, add_special_tokens=False)["input_ids"]])
    return {
        "prompt_ids": tokenizer(texts, add_special_tokens=template == "alpaca")[
            "input_ids"
        ],  # the chat template has its own
        "answer_ids": [[next(ended) for _ in answers] for answers in rows["answers"]],
    }
