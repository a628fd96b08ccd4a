"""`python -m attention_zoo COMMAND ...`, which is `attention-zoo COMMAND ...`; `--help` lists the commands."""

from attention_zoo.commands.main import console

if __name__ == "__main__":
    console()
