"""`python -m attention_zoo COMMAND ...`, which is `attention-zoo COMMAND ...`; `--help` lists the commands."""

from attention_zoo_start import start

if __name__ == "__main__":
    start()
