"""Numbers of real TransfoXL models: dump.py makes them where transformers still runs these, `models/` keeps some."""
