"""One sequence over several processes: columns cut, losses and gradients summed, and what it costs on paper."""
