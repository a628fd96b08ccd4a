// What each token sees: one small picture for each mechanism.
zoo.pictures = (() => {
  const kinds = ['not seen', 'seen without gradient', 'seen'];
  let gallery;

  function numbers(pairs) {
    const length = pairs.length,
      seen = pairs.map(line => [...line].map((kind, j) => (kind === '0' ? -1 : j)).filter(j => j >= 0));
    const total = seen.reduce((sum, line) => sum + line.length, 0);
    const far = Math.max(0, ...seen.map((line, i) => (line.length ? i - line[0] : 0)));
    const bare = pairs.reduce((sum, line) => sum + line.split('1').length - 1, 0);
    return [
      ['share of the causal half', zoo.words.percent(total / ((length * (length + 1)) / 2))],
      ['keys a query, mean', (total / length).toFixed(1)],
      ['keys a query, most', Math.max(...seen.map(line => line.length))],
      ['farthest key seen', `${far} back`],
      ['pairs without gradient', bare],
    ];
  }

  function paint(canvas, size, run) {
    const {blank, muted} = zoo.theme.ink();
    const shades = [blank, muted, zoo.theme.color(zoo.data.styles[run.label])];
    zoo.picture.grid(canvas, size, run.pairs.length, run.pairs.length, (context, i, j) => {
      context.fillStyle = shades[run.pairs[i][j]];
    });
  }

  const picture = (group, run) =>
    zoo.picture.figure({
      label: run.label,
      group,
      key: run.key,
      said: numbers(run.pairs),
      paint: (canvas, size) => paint(canvas, size, run),
      file: `pattern-${run.label}`,
      note: run.options || 'default options',
      data: {key: run.key},
    });

  const groups = () => zoo.select.drawn(run => run.pairs);

  function start(outer) {
    const box = zoo.el('div', {class: 'pictures'});
    outer.append(
      zoo.el('h3', {}, 'Attention patterns'),
      zoo.el(
        'p',
        {class: 'note'},
        'Found by asking each layer: one input token is changed, and every output that moves has seen it. ' +
          'Rows are queries, columns keys; one head, causal, ' +
          `at small options so that borders show. Coloured: ${kinds[2]}; grey: ${kinds[1]} (detached memory).`,
      ),
      box,
    );
    const told = () => {
      const now = groups();
      return now.length ? now.map(group => [group.name, group.runs.map(run => run.index)]) : null;
    };
    gallery = zoo.picture.gallery(outer, box, told, () =>
      groups().flatMap(group => group.runs.map(run => picture(group.name, run))),
    );
    gallery.draw();
  }

  return {start, draw: () => gallery.draw(), again: () => gallery.again()};
})();
