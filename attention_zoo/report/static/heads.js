// What each head of inspected models attends to: maps of its weights beside each other, and its figures as a chart.
(() => {
  const letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/';
  const words = zoo.words;
  const figures = {
    distance: ['mean distance in tokens', words.significant],
    entropy: ['entropy in bits', words.fixed],
    outside: ['share beyond the window', words.percent],
    sinks: ['share on sinks', words.percent],
    mass: ['share on keys that are drawn', words.percent],
    share: ['share of what the layer adds', words.percent],
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

  const placed = (layer, head) => `${layer.name}, head ${head}`;

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
        const points = run.layers.flatMap(layer =>
          (layer[what] ?? []).map((value, head) => ({layer, value, head})),
        );
        return {
          group: run.group,
          alone: run.key,
          name: run.label,
          style: run.style,
          mode: 'markers',
          x: points.map(each => each.layer.number),
          y: points.map(each => each.value),
          keys: points.map(() => (run.key === null ? [] : [run.key])),
          said: points.map(({layer, value, head}) =>
            [run.label, placed(layer, head), `${title}: ${say(value)}`].join('\n'),
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

  function paint(canvas, size, [, lines], style) {
    const color = zoo.theme.color(style);
    zoo.picture.grid(canvas, size, lines.length, lines[0]?.length ?? 0, (context, i, j) => {
      context.fillStyle = color;
      context.globalAlpha = letters.indexOf(lines[i][j]) / (letters.length - 1);
    });
  }

  const picture = (run, layer, head) =>
    zoo.picture.figure({
      label: run.label,
      place: placed(layer, head),
      group: run.group,
      key: run.key,
      said: said(layer, head),
      paint: (canvas, size) => paint(canvas, size, layer.maps[head], run.style),
      file: `attention-${run.label}-${layer.name}-${head}`,
      note:
        `${placed(layer, head)}, largest ${words.significant(layer.maps[head][0])}` +
        (layer.keys === 'tokens' ? '' : `; columns are ${layer.keys}`),
      data: {layer: layer.name, head},
    });

  // The figures of all heads of all layers, for a file.
  function save(runs) {
    const names = Object.keys(figures);
    const lines = runs.flatMap(run =>
      run.layers.flatMap(layer =>
        layer.maps.map((_, head) => [
          run.label,
          run.name,
          layer.name,
          layer.keys,
          head,
          ...names.map(name => layer[name]?.[head] ?? null),
        ]),
      ),
    );
    zoo.saveCsv('heads', [['mechanism', 'run', 'layer', 'keys', 'head', ...names], ...lines]);
  }

  // The layers of all runs; one of two attentions is one place.
  function places(runs) {
    const found = new Map();
    for (const run of runs) for (const layer of run.layers) found.set(layer.place, layer.number);
    return [...found.keys()].sort((a, b) => found.get(a) - found.get(b));
  }

  const chosen = names => Math.max(0, Math.min(Number(zoo.state.get().layer) || 0, names.length - 1));

  zoo.heads = (() => {
    let gallery, note, choices;

    function told() {
      const {at, runs} = now(),
        names = places(runs);
      return names.length ? [at, chosen(names), runs.map(run => [run.key, run.group, run.style])] : null;
    }

    function build() {
      const {at, inspection, runs} = now(),
        names = places(runs),
        place = chosen(names);
      const here = runs.flatMap(run =>
        run.layers.filter(layer => layer.place === names[place]).map(layer => ({run, layer})),
      );
      const blocks = here[0].layer.maps[0]?.[1].length ?? 0;
      note.textContent =
        `“${inspection.title}”, ${words.count(inspection.tokens)} tokens in ${blocks} blocks a side, as each run's ` +
        'own kernels weigh them. Rows are queries, columns keys; the stronger the colour the more, each head by its ' +
        'own largest weight.';
      choices.replaceChildren(
        ...which(at),
        zoo.choice(
          'Layer',
          names.map((name, i) => [String(i), name]),
          String(place),
          value => zoo.state.change({layer: value}),
        ),
        zoo.button('CSV', () => save(now().runs), {'aria-label': 'Download the figures of all heads as CSV'}),
      );
      const heads = Math.max(0, ...here.map(each => each.layer.maps.length));
      // a line for each head, in which those of the runs stand beside each other
      return Array.from({length: heads}, (_, head) =>
        zoo.el(
          'div',
          {class: 'pictures', data: {head}},
          here.filter(each => each.layer.maps[head]).map(({run, layer}) => picture(run, layer, head)),
        ),
      );
    }

    function start(outer) {
      note = zoo.el('p', {class: 'note'});
      choices = zoo.el('div', {class: 'choices'});
      const box = zoo.el('div');
      outer.append(zoo.el('h3', {}, 'What heads attend to'), note, choices, box);
      gallery = zoo.picture.gallery(outer, box, told, build);
      gallery.draw();
    }

    return {start, draw: () => gallery.draw(), again: () => gallery.again()};
  })();
})();
