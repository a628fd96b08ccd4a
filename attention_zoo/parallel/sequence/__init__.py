"""One sequence over several processes: its columns cut, its losses and gradients summed, and what that costs on paper."""
