// What each token sees: one small picture for each mechanism.
zoo.pictures = (() => {
  const kinds = ['not seen', 'seen without gradient', 'seen'];
  const cell = 4;
  let box,
    outer,
    painted = '';

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

  function paint(canvas, run, size = cell) {
    const length = run.pairs.length,
      colors = zoo.theme.ink(),
      style = zoo.data.styles[run.label];
    const shades = [colors.blank, colors.muted, zoo.theme.color(style)],
      context = canvas.getContext('2d');
    canvas.width = canvas.height = length * size;
    run.pairs.forEach((line, i) => {
      for (let j = 0; j < length; j += 1) {
        context.fillStyle = shades[line[j]];
        context.fillRect(j * size, i * size, size, size);
      }
    });
  }

  function picture(group, run) {
    const said = numbers(run.pairs);
    const canvas = zoo.el('canvas', {
      role: 'img',
      'aria-label': `${run.label}: ${said.map(([name, value]) => `${name} ${value}`).join(', ')}`,
    });
    paint(canvas, run);
    const save = () => {
      const large = zoo.el('canvas');
      paint(large, run, 12);
      large.toBlob(blob => zoo.save(`pattern-${run.label}.png`.replace(/[^\w.-]+/g, '-'), blob));
    };
    return zoo.el(
      'figure',
      {
        class: 'picture',
        data: {group, key: run.key},
        onpointerenter: () => zoo.link.point({group, keys: [run.key]}),
        onpointerleave: () => zoo.link.point(null),
      },
      zoo.el(
        'figcaption',
        {},
        zoo.button(run.label, () => zoo.link.choose(run.key), {class: 'plain'}),
        zoo.button('PNG', save, {'aria-label': `Download the picture of ${run.label}`}),
      ),
      canvas,
      zoo.el('p', {class: 'note'}, run.options || 'default options'),
      zoo.el('details', {}, zoo.el('summary', {}, 'Numbers'), zoo.table(['', run.label], said)),
    );
  }

  function draw() {
    const groups = zoo.select.drawn(run => run.pairs);
    outer.hidden = !groups.length;
    const said = JSON.stringify([
      zoo.theme.dark(),
      groups.map(group => [group.name, group.runs.map(run => run.index)]),
    ]);
    if (said === painted) return;
    painted = said;
    box.replaceChildren(...groups.flatMap(group => group.runs.map(run => picture(group.name, run))));
    mark(zoo.link.now());
  }

  function mark(what) {
    const there = [...box.children].some(figure => figure.dataset.group === what?.group);
    for (const figure of box.children) figure.classList.toggle('faint', there && figure.dataset.group !== what.group);
  }

  function start(node) {
    outer = node;
    box = zoo.el('div', {class: 'pictures'});
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
    zoo.link.listen(mark);
    draw();
  }

  const again = () => {
    painted = '';
    draw();
  };
  return {start, draw, again};
})();
