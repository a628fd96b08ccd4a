// What each head of inspected models attends to: maps of its weights beside each other, and its figures as a chart.
(() => {
  const letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/';
  const words = zoo.words;
  const figures = {
    distance: ['mean distance in tokens', words.significant],
    entropy: ['entropy in bits', words.fixed],
    outside: ['share beyond the window', words.percent],
    sinks: ['share on sinks', words.percent],
    mass: ['share on tokens', words.percent],
  };

  const all = () => zoo.data.attention ?? [];

  // The inspection that is looked at, and those of its runs that the filters leave, each with its group and look.
  function now() {
    const state = zoo.state.get(),
      at = Math.min(Number(state.seen) || 0, Math.max(0, all().length - 1)),
      inspection = all()[at];
    if (!inspection) return {at, inspection, runs: []};
    const shown = new Set(zoo.select.shown().map(run => run.key));
    const runs = inspection.runs
      .filter(run => run.key === null || shown.has(run.key))
      .map(run => {
        const known = zoo.byKey.get(run.key);
        const group = known ? zoo.select.groupOf(known) : run.label;
        return {...run, group, style: zoo.select.looks()[group] ?? zoo.data.styles[run.label]};
      })
      .filter(run => !state.off.includes(run.group));
    return {at, inspection, runs};
  }

  const said = (layer, head) =>
    Object.entries(figures)
      .filter(([name]) => layer[name])
      .map(([name, [title, say]]) => [title, say(layer[name][head])]);

  function which(at) {
    const many = all().map((each, i) => [String(i), each.title]);
    return many.length < 2 ? [] : [zoo.choice('Text', many, String(at), seen => zoo.state.change({seen}))];
  }

  zoo.charts.add({
    key: 'heads',
    title: 'Where heads look',
    build: () => {
      const {at, inspection, runs} = now();
      const kinds = Object.keys(figures).filter(name => runs.some(run => run.layers.some(layer => layer[name])));
      if (!kinds.length) return null;
      const wanted = zoo.state.get().look,
        what = kinds.includes(wanted) ? wanted : kinds[0],
        [title, say] = figures[what];
      const series = runs.map(run => {
        const points = run.layers.flatMap((layer, number) =>
          (layer[what] ?? []).map((value, head) => ({number, value, head})),
        );
        return {
          group: run.group,
          alone: run.key,
          name: run.label,
          style: run.style,
          mode: 'markers',
          x: points.map(each => each.number),
          y: points.map(each => each.value),
          keys: points.map(() => (run.key === null ? [] : [run.key])),
          said: points.map(({number, value, head}) =>
            [run.label, `layer ${number}, head ${head}`, `${title}: ${say(value)}`].join('\n'),
          ),
        };
      });
      return {
        series: series.filter(each => each.x.length),
        x: {title: 'layer', dtick: 1},
        y: {title},
        say,
        note:
          `“${inspection.title}”, ${words.count(inspection.tokens)} tokens: a point for each head. ` +
          `The window is ${inspection.window} tokens, sinks are the first ${inspection.sinks}.`,
        choices: [
          ...which(at),
          zoo.choice(
            'What',
            kinds.map(kind => [kind, figures[kind][0]]),
            what,
            look => zoo.state.change({look}),
          ),
        ],
      };
    },
  });

  function paint(canvas, [, lines], style, size = 4) {
    const colors = zoo.theme.ink(),
      context = canvas.getContext('2d');
    canvas.width = canvas.height = Math.max(1, lines.length) * size;
    context.fillStyle = colors.blank;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = zoo.theme.color(style);
    lines.forEach((line, i) =>
      [...line].forEach((letter, j) => {
        context.globalAlpha = letters.indexOf(letter) / (letters.length - 1);
        context.fillRect(j * size, i * size, size, size);
      }),
    );
  }

  function picture(run, layer, number, head) {
    const numbers = said(layer, head),
      place = `layer ${number}, head ${head}`;
    const canvas = zoo.el('canvas', {
      role: 'img',
      'aria-label': `${run.label}, ${place}: ${numbers.map(each => each.join(' ')).join(', ')}`,
    });
    paint(canvas, layer.maps[head], run.style);
    const save = () => {
      const large = zoo.el('canvas');
      paint(large, layer.maps[head], run.style, 12);
      large.toBlob(blob => zoo.save(`attention-${run.label}-${number}-${head}.png`.replace(/[^\w.-]+/g, '-'), blob));
    };
    const point = () => zoo.link.point({group: run.group, keys: run.key === null ? [] : [run.key]});
    return zoo.el(
      'figure',
      {
        class: 'picture',
        data: {group: run.group, layer: number, head},
        onpointerenter: point,
        onpointerleave: () => zoo.link.point(null),
      },
      zoo.el(
        'figcaption',
        {},
        run.key === null
          ? zoo.el('span', {class: 'name'}, run.label)
          : zoo.button(run.label, () => zoo.link.choose(run.key), {class: 'plain'}),
        zoo.button('PNG', save, {'aria-label': `Download the weights of ${run.label}, ${place}`}),
      ),
      canvas,
      zoo.el('p', {class: 'note'}, `${place}, largest ${words.significant(layer.maps[head][0])}`),
      zoo.el('details', {}, zoo.el('summary', {}, 'Numbers'), zoo.table(['', place], numbers)),
    );
  }

  // The figures of all heads of all layers, for a file.
  function save(runs) {
    const names = Object.keys(figures);
    const lines = runs.flatMap(run =>
      run.layers.flatMap((layer, number) =>
        layer.maps.map((_, head) => [
          run.label,
          run.name,
          number,
          head,
          ...names.map(name => layer[name]?.[head] ?? null),
        ]),
      ),
    );
    zoo.saveCsv('heads', [['mechanism', 'run', 'layer', 'head', ...names], ...lines]);
  }

  zoo.heads = (() => {
    let outer,
      box,
      note,
      choices,
      painted = '';

    function draw() {
      const {at, inspection, runs} = now(),
        depth = Math.max(0, ...runs.map(run => run.layers.length));
      outer.hidden = !depth;
      const wanted = Number(zoo.state.get().layer) || 0,
        layer = Math.max(0, Math.min(wanted, depth - 1));
      const told = JSON.stringify([zoo.theme.dark(), at, layer, runs.map(run => [run.key, run.group, run.style])]);
      if (!depth || told === painted) return;
      painted = told;
      const blocks = runs[0].layers[0]?.maps[0]?.[1].length ?? 0;
      note.textContent =
        `“${inspection.title}”, ${words.count(inspection.tokens)} tokens in ${blocks} blocks a side, as each run's ` +
        'own kernels weigh them. Rows are queries, columns keys; the stronger the colour the more, each head by its ' +
        'own largest weight.';
      choices.replaceChildren(
        ...which(at),
        zoo.choice(
          'Layer',
          Array.from({length: depth}, (_, i) => [String(i), `layer ${i}`]),
          String(layer),
          value => zoo.state.change({layer: value}),
        ),
        zoo.button('CSV', () => save(now().runs), {'aria-label': 'Download the figures of all heads as CSV'}),
      );
      const here = runs.filter(run => run.layers[layer]);
      const heads = Math.max(0, ...here.map(run => run.layers[layer].maps.length));
      box.replaceChildren(
        // a line for each head, in which those of the runs stand beside each other
        ...Array.from({length: heads}, (_, head) =>
          zoo.el(
            'div',
            {class: 'pictures', data: {head}},
            here
              .filter(run => run.layers[layer].maps[head])
              .map(run => picture(run, run.layers[layer], layer, head)),
          ),
        ),
      );
      mark(zoo.link.now());
    }

    function mark(what) {
      const pictures = [...box.querySelectorAll('.picture')];
      const there = pictures.some(figure => figure.dataset.group === what?.group);
      for (const figure of pictures)
        figure.classList.toggle('faint', there && figure.dataset.group !== what.group);
    }

    function start(node) {
      outer = node;
      note = zoo.el('p', {class: 'note'});
      choices = zoo.el('div', {class: 'choices'});
      box = zoo.el('div');
      outer.append(zoo.el('h3', {}, 'What heads attend to'), note, choices, box);
      zoo.link.listen(mark);
      draw();
    }

    const again = () => {
      painted = '';
      draw();
    };
    return {start, draw, again};
  })();
})();
