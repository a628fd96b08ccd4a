"""Result rows: what each kind holds (`row`), and whether something that was read is one (`check`)."""
