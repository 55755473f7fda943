"""A chat without end in the terminal: one cache over all turns, the system prompt kept as its sinks.

    python examples/chat.py --window-length 1024 --system "You keep a lighthouse."

It needs `pip install .` in the repository, and takes any model on the Hub or in a folder.
Only what is new is read: a turn costs the same after ten minutes and after ten days. Ctrl-C stops an answer.
"""

import argparse
import signal
from typing import Any, Optional

import torch
import transformers
from rich.console import Console
from sink_cache import SinkCache, generate
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, TextStreamer

HELP = "/stats  /reset  /save FILE  /load FILE  /quit    Ctrl-C stops an answer"


class Interrupted(StoppingCriteria):
    """Stops a generation between two tokens once Ctrl-C was pressed, so that the cache stays whole."""

    def __enter__(self) -> "Interrupted":
        self.pressed = False
        self.before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "pressed", True))
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGINT, self.before)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.pressed, device=input_ids.device)


class Chat:
    """A conversation of which the cache is all that is kept.

    Args:
        system: the system prompt, all of it kept for ever; None for none, and 4 sinks.
        settings: what `generate` is called with.
    """

    def __init__(self, model: Any, tokenizer: Any, window_length: int, system: Optional[str], **settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.system = [{"role": "system", "content": system}] if system else []
        num_sink_tokens = self.ids(self.text(self.system)).shape[1] if system else 4
        self.cache = SinkCache(window_length, num_sink_tokens).bind(model)
        # How the template opens a later turn, and ends an answer: seen in a conversation that has both.
        said = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
        self.said, self.end_of_answer = said, self.text(self.system + said).rpartition("B")[2]

    def text(self, messages: list[dict], **kwargs) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    def ids(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)  # of no text too

    def turn(self, message: str) -> torch.Tensor:
        """The tokens that a message adds to the conversation, `[1, tokens]`."""
        before, start = self.system, 0
        if self.cache.get_seq_length() > 0:
            before = self.system + self.said
            start = len(self.text(before))
        whole = self.text([*before, {"role": "user", "content": message}], add_generation_prompt=True)
        return self.ids(whole[start:])

    def answer(self, message: str) -> None:
        """Take in a message, print the answer as it comes, and take that in too."""
        new, seen = self.turn(message), self.cache.get_seq_length()
        with Interrupted() as interrupted:
            sequences = generate(
                self.model,
                input_ids=new,
                attention_mask=new.new_ones(1, seen + new.shape[1]),
                cache=self.cache,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=[interrupted],
                **self.settings,
            )
            unseen = sequences[:, self.cache.get_seq_length() - seen :]
            end = self.ids(self.end_of_answer)
            if unseen[0, -1:].equal(end[0, :1]):  # templates may put nothing after an answer
                end = end[:, 1:]
            with torch.no_grad():
                self.model(**self.cache.prepare_inputs(torch.cat([unseen, end], dim=1)))

    def stats(self) -> str:
        seen = self.cache.get_seq_length()
        kept = min(seen, self.cache.window_length)
        sinks, size = self.cache.num_sink_tokens, self.cache.nbytes / 2**20
        return f"{seen:,} tokens seen, {kept:,} kept ({sinks} of them for ever), {size:.3g} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a Hub id or a folder")
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--max-new-tokens", type=int, default=1000, help="of an answer")
    parser.add_argument("--system", help="a system prompt")
    arguments = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, torch_dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    chat = Chat(model, tokenizer, arguments.window_length, arguments.system, max_new_tokens=arguments.max_new_tokens)

    console = Console(highlight=False)
    console.print(HELP, style="dim")
    while True:
        try:
            command, _, rest = (message := console.input("[bold cyan]> [/bold cyan]").strip()).partition(" ")
        except (EOFError, KeyboardInterrupt):
            break
        try:
            if command == "/quit":
                break
            elif command == "/stats":
                console.print(chat.stats(), style="cyan")
            elif command == "/reset":
                chat.cache.reset()
            elif command == "/save":
                chat.cache.save(rest)
            elif command == "/load":
                chat.cache = SinkCache.load(rest, model)
            elif command.startswith("/"):
                console.print(HELP, style="dim")
            elif message:
                chat.answer(message)
                console.print()
        except (ValueError, OSError) as error:  # a file that isn't there, or of another model
            console.print(str(error), style="red", markup=False)
        except KeyboardInterrupt:  # before an answer began
            continue


if __name__ == "__main__":
    main()
