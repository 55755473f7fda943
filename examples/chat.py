"""A chat without end in the terminal: one cache over all turns, the system prompt kept as its sinks.

    python examples/chat.py --window-length 1024 --system "You keep a lighthouse."

It needs `pip install .` in the repository, and takes any model on the Hub or in a folder.
Only what is new is read: a turn costs the same after ten minutes and after ten days. Ctrl-C stops an answer.
"""

import argparse
import copy
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

    Models that think fill a window with thoughts, which their chat templates leave out of later turns. So a copy of the
    cache is kept from where the answer begins. If the template leaves something out, the copy reads what is left.

    Args:
        system: the system prompt, all of it kept for ever; None for none, and 4 sinks.
        settings: what `generate` is called with.
    """

    def __init__(self, model: Any, tokenizer: Any, window_length: int, system: Optional[str], **settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.system = [{"role": "system", "content": system}] if system else []
        num_sink_tokens = self.ids(self.text([])).shape[1] if system else 4
        self.cache = SinkCache(window_length, num_sink_tokens).bind(model)
        ends = model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]

    def text(self, messages: list[dict], **kwargs) -> str:
        return self.tokenizer.apply_chat_template(self.system + messages, tokenize=False, **kwargs)

    def ids(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)  # of no text too

    def turn(self, message: dict) -> str:
        """What a message adds to a conversation: the end of the answer before it, and the message."""
        question, answer = {"role": "user", "content": "Is it?"}, "It is."
        whole = self.text([question, {"role": "assistant", "content": answer}, message])
        return whole[len(self.text([question])) :].partition(answer)[2]

    def later(self, message: dict, answer: str) -> str:
        """What an answer to a message adds to the conversation, as the template has it in later turns."""
        whole = self.text([message, {"role": "assistant", "content": answer}, message])
        return whole[len(self.text([message])) :].removesuffix(self.turn(message))

    def go_on(self, ids: torch.Tensor, **settings) -> torch.Tensor:
        """Read tokens, `[1, tokens]`, and return those that the model says then, of which the last one is not read."""
        mask = ids.new_ones(1, self.cache.get_seq_length() + ids.shape[1])
        sequences = generate(self.model, input_ids=ids, attention_mask=mask, cache=self.cache, **settings)
        return sequences[:, ids.shape[1] :]

    def answer(self, content: str) -> None:
        """Take in a message, print the answer as it comes, and take that in too."""
        message = {"role": "user", "content": content}
        before = self.text([message])
        opening = self.text([message], add_generation_prompt=True)[len(before) :]
        new = self.ids(before if self.cache.get_seq_length() == 0 else self.turn(message))
        with Interrupted() as interrupted:
            self.go_on(new[:, :-1], max_new_tokens=1)
            last, beginning = new[:, -1:], copy.deepcopy(self.cache)
            said = self.go_on(
                torch.cat([last, self.ids(opening)], dim=1),
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=[interrupted],
                **self.settings,
            )
            ended = said[0, -1].item() in self.ends  # by a token that the next turn begins with
            answer = self.tokenizer.decode(said[0, : said.shape[1] - ended])
            later = self.later(message, answer)
            if later != opening + answer:
                self.cache = beginning
                self.go_on(torch.cat([last, self.ids(later)], dim=1), max_new_tokens=1)
            elif not ended:
                self.go_on(said[:, -1:], max_new_tokens=1)

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
