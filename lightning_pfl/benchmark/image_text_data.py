"""Published tasks for published models: pictures and questions as a model's own processor wants them.

Start at `ImageTextData`, a LightningDataModule of one task, or at `ImageTextCollator`, which turns examples into
batches. A batch is a dict:

    inputs         what the processor gives for pictures and prompts, padded on the left
    answer_ids     [b, t]     tokens of the right answer with what ends a turn, -1 on padding
    candidate_ids  [b, c, t]  the same of every choice; -1 on padding and for what is not offered
    answer         [b]        index of the right choice; -1 for an open question
    texts          b texts    the right answers, for open questions
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, final

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.records import RecordError
from lightning_pfl.benchmark.tasks import IMAGE_MARK, Example, Task

__all__ = ["ImageTextCollator", "ImageTextData"]


@final
class ImageTextCollator:
    """Makes batches with a model's processor.

    The question goes through the processor's chat template as one turn of a user, pictures where the question has
    `<image>`. What the template puts after an answer (end of turn) belongs to the answer, so that "red" and "red
    circle" exclude each other. A processor without a template gets the plain question and "Answer:". Pictures become
    squares, padded with the processor's mean colour, as LLaVA's are.

    Args:
        processor: of the model, from `load_image_text`.

    Raises:
        ValueError: in a call: the prompt of an example shows another number of pictures than it has.
        RecordError: in a call: a picture that cannot be read; names the example.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch of some examples."""
        prompts = [self.prompt(example) for example in examples]
        pictures = [[self._picture(view, example) for view in example.images] for example in examples]
        begins = self.tokenizer.bos_token is not None and all(p.startswith(self.tokenizer.bos_token) for p in prompts)
        inputs = dict(
            self.processor(
                images=pictures if any(pictures) else None,
                text=prompts,
                padding=True,
                padding_side="left",
                add_special_tokens=not begins,  # a template that writes the first token itself must not have it twice
                return_tensors="pt",
            )
        )
        answers = [self.continuation(example, example.answer) for example in examples]
        offered = [[self.continuation(example, choice) for choice in example.choices] for example in examples]
        width = max((len(row) for rows in offered for row in rows), default=1)
        most = max(1, *(len(rows) for rows in offered))
        candidates = torch.full((len(examples), most, width), -1)
        for row, rows in enumerate(offered):
            for column, ids in enumerate(rows):
                candidates[row, column, : len(ids)] = torch.tensor(ids)
        right = [example.choices.index(example.answer) if example.choices else -1 for example in examples]
        return {
            "inputs": inputs,
            "answer_ids": _padded(answers),
            "candidate_ids": candidates,
            "answer": torch.tensor(right),
            "texts": [example.answer for example in examples],
        }

    def prompt(self, example: Example) -> str:
        """What the model reads before it answers, with one picture token per picture."""
        if getattr(self.processor, "chat_template", None) is None:
            return f"{example.question.replace(IMAGE_MARK, self._mark)}\nAnswer:"
        return self._templated(self._content(example))

    def continuation(self, example: Example, answer: str) -> list[int]:
        """Tokens of an answer and of what ends it."""
        ending = self.tokenizer.eos_token or ""
        text = f" {answer}{ending}"
        if getattr(self.processor, "chat_template", None) is not None:
            content = self._content(example)
            whole, before = self._templated(content, answer=answer), self._templated(content)
            if whole.startswith(before) and answer in whole[len(before) :]:
                text = whole[len(before) :].rstrip("\n")
            else:
                text = f"{answer}{ending}"
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def _mark(self) -> str:
        """What stands for a picture in a prompt."""
        mark: str = getattr(self.processor, "image_token", IMAGE_MARK)
        return mark

    def _content(self, example: Example) -> Any:
        """The question in the form that keeps its pictures: some templates know parts, older ones only text."""
        plain = example.question.replace(IMAGE_MARK, self._mark)
        for content in (_parts(example.question), plain):
            prompt = self._templated(content)
            is_literal = not isinstance(content, str) and "'type':" in prompt  # a list that was written out as it is
            if prompt.count(self._mark) == len(example.images) and not is_literal:
                return content
        raise ValueError(
            f"The prompt of {example.id} must show its {len(example.images)} pictures with {self._mark!r} each, but "
            f"the processor's chat template makes {prompt!r} of it. Give the processor a template that keeps pictures."
        )

    def _templated(self, content: Any, *, answer: str | None = None) -> str:
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            said = answer if isinstance(content, str) else [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": said})
        rendered: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None
        )
        return rendered

    def _picture(self, view: View, example: Example) -> Image.Image:
        try:
            with view.path.open("rb") as stream:
                image = Image.open(stream).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise RecordError(f"{example.id} shows {view.path}, which cannot be read as an image: {error}") from error
        mean = getattr(self.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(round(255 * channel) for channel in mean[:3]))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        for edit in view.edits:
            square = edit.apply(square)
        return square


@final
class ImageTextData(L.LightningDataModule):
    """One task for one published model.

    Args:
        task: train, val and test examples, such as `read_task` gives.
        processor: of the model.
        batch_size: examples per training step and per evaluation batch.
        num_workers: of all loaders; pictures are read and scaled there.
    """

    def __init__(self, task: Task, processor: Any, *, batch_size: int = 4, num_workers: int = 0) -> None:
        super().__init__()
        self.task = task
        self.collate = ImageTextCollator(processor)
        self.batch_size, self.num_workers = batch_size, num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches."""
        return self._loader(self.task.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches in order."""
        return self._loader(self.task.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches in order."""
        return self._loader(self.task.test)

    predict_dataloader = test_dataloader

    def _loader(self, examples: Sequence[Example], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            cast(Any, examples),
            self.batch_size,
            shuffle=shuffle,
            collate_fn=cast(Any, self.collate),
            num_workers=self.num_workers,
        )


def _parts(question: str) -> list[dict[str, str]]:
    """A question as a list of texts and pictures, in order.

    Example:
        >>> _parts("<image> What?")
        [{'type': 'image'}, {'type': 'text', 'text': ' What?'}]
    """
    parts: list[dict[str, str]] = []
    for index, text in enumerate(question.split(IMAGE_MARK)):
        if index:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    padded = torch.full((len(rows), max(len(row) for row in rows)), -1)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    return padded
