// Columns of the table of runs: words of a field, or a figure.
zoo.columns = (() => {
  const first = ['label', 'task', 'length', 'seed', 'status'];
  const titles = {
    label: 'run',
    score: 'score',
    peak_bytes: 'peak memory',
    seconds: 'time of a call',
    tokens_per_second: 'tokens/s',
    train_seconds: 'training',
    evaluation_tokens_per_second: 'tokens/s in inference',
    flops_per_token: 'FLOPs a token',
    state_bytes: 'state',
    floor_ratio: '× floor',
  };
  const usual = [
    'score',
    'seconds',
    'peak_bytes',
    'parameters',
    'train_seconds',
    'flops_per_token',
    'tokens_per_second',
    'evaluation_tokens_per_second',
    'state_bytes',
    'time_ratio',
    'memory_ratio',
  ];

  const field = name => ({
    name,
    title: titles[name] ?? name.replace(/_/g, ' '),
    figure: false,
    get: run => (name === 'label' ? zoo.title(run) : zoo.ask(run, name)),
    words: run => {
      if (name === 'label') return run.label + (run.against ? ` against ${run.against}` : '');
      if (name === 'status') return `${run.why ?? zoo.ask(run, name)}${run.stale ? ', stale' : ''}`;
      const value = zoo.ask(run, name);
      return value === null ? zoo.words.none : name === 'length' ? zoo.words.count(value) : value;
    },
  });

  const words = (name, run, value) => {
    if (name !== 'score') return zoo.words.of(name)(value);
    const task = zoo.select.taskOf(zoo.ask(run, 'task'));
    return (task?.share ? zoo.words.percent : zoo.words.fixed)(value);
  };

  const figure = name => ({
    name,
    title: titles[name] ?? name.replace(/^metrics\./, '').replace(/_/g, ' '),
    figure: true,
    get: run => run.n[name] ?? null,
    words: run => (run.n[name] === undefined ? zoo.words.none : words(name, run, run.n[name])),
    said: (value, runs) => words(name, runs[0], value),
  });

  let figures = [];
  const load = () => {
    figures = [...new Set(zoo.runs.flatMap(run => Object.keys(run.n)))];
  };
  const all = () => [...zoo.data.fields.map(([name]) => field(name)), ...figures.map(figure)];
  const one = name => (figures.includes(name) ? figure(name) : zoo.place.has(name) ? field(name) : null);

  // What was asked for, or else what most shown runs can fill.
  function shown() {
    const {cols, where} = zoo.state.get();
    if (cols.length) return ['label', ...cols.filter(name => name !== 'label')].map(one).filter(Boolean);
    const runs = zoo.select.shown();
    const said = first.filter(name => name === 'label' || zoo.varying.includes(name));
    const held = usual.filter(name => runs.some(run => run.n[name] !== undefined));
    return [
      ...new Set([
        ...said,
        ...held,
        ...Object.keys(where).filter(name => zoo.varying.includes(name)),
        ...zoo.state.get().facets,
      ]),
    ]
      .map(one)
      .filter(Boolean);
  }

  return {load, all, one, shown};
})();
