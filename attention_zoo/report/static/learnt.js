// What was learnt: quality over seeds, and quality beside cost.
(() => {
  const {told, known, better, seed, chosen, yOf, caution} = zoo.tasks;
  const words = zoo.words;

  zoo.charts.add({
    key: 'quality',
    title: 'Quality over seeds',
    build: () => {
      const {task, choices} = chosen(run => run.n.score !== undefined);
      if (!task) return null;
      const most = innerWidth < 700 ? 18 : 40,
        short = new Set(),
        place = name => {
          let text = name.length > most ? `${name.slice(0, most - 1)}…` : name;
          while (short.has(text)) text += ' ';
          short.add(text);
          return text;
        };
      const series = zoo.select.drawn(known(task)).map(group => {
        const at = place(group.name);
        return {
          group: group.name,
          name: group.name,
          style: group.style,
          mode: 'markers',
          size: 10,
          y: group.runs.map(() => at),
          x: group.runs.map(run => run.n.score),
          keys: group.runs.map(run => [run.key]),
          said: group.runs.map(run => `${group.name}\n${told(task)(run.n.score)} ${task.words}\n${seed(run)}`),
        };
      });
      if (!series.length) return null;
      // bars that are far from all runs would squeeze them into a corner: those are told, not drawn
      const scores = series.flatMap(each => each.x),
        [low, high] = [Math.min(...scores), Math.max(...scores)];
      const bars = Object.entries(task.bars),
        room = Math.max(high - low, 0.02 * Math.abs(high), 1e-6);
      const near = bars.filter(([, value]) => task.share || (value > low - room && value < high + room));
      const ends = [...scores, ...near.map(([, value]) => value)];
      const range = [Math.min(...ends) - 0.08 * room, Math.max(...ends) + 0.08 * room];
      const note = `${task.title}: ${task.judged}, a mark for each run.${
        bars.length
          ? ` Needs no model: ${bars
              .map(([name, value]) => `${name} ${told(task)(value)}`)
              .join(', ')}${near.length ? ' (dotted)' : ''}.`
          : ''
      }${caution(task)}`;
      return {
        note,
        choices,
        series,
        say: String,
        sayX: told(task),
        height: Math.min(900, 90 + 24 * series.length),
        y: {title: '', type: 'category', autorange: 'reversed'},
        x: task.share ? zoo.gather.share(better(task)) : {title: better(task), range},
        shapes: near.map(([, value]) => ({yref: 'paper', y0: 0, y1: 1, x0: value, x1: value})),
      };
    },
  });

  // Costs of the lines that stand beside a task's groups, at the longest length that all of them reach.
  function priced(task, figure) {
    const setting = zoo.select.setting().value;
    const beside = zoo.data.beside.find(each => each.task === task.title && each.setting === setting);
    if (!beside) return null;
    const cost = new Map();
    for (const run of zoo.select.shown().filter(zoo.ofSetting(setting))) {
      const value = figure === 'peak_bytes' ? (run.why ? null : run.n.peak_bytes) : run.n.seconds;
      if (!value) continue;
      if (!cost.has(run.label)) cost.set(run.label, new Map());
      cost.get(run.label).set(Number(zoo.ask(run, 'length')), [value, run.key]);
    }
    const pairs = beside.pairs.filter(([, line]) => cost.has(line));
    if (!pairs.length) return null;
    const common = pairs
      .map(([, line]) => [...cost.get(line).keys()])
      .reduce((a, b) => a.filter(each => b.includes(each)));
    return common.length ? {length: Math.max(...common), pairs, cost, setting} : null;
  }

  function pareto(figure, unit, binary) {
    const {task, choices} = chosen(run => run.n.score !== undefined);
    const found = task && priced(task, figure);
    if (!found) return null;
    const say = words.of(figure),
      series = [],
      points = [],
      drawn = new Set();
    const {off} = zoo.state.get(),
      runs = zoo.select.shown().filter(known(task));
    for (const [label, line] of found.pairs) {
      const mine = runs.filter(run => run.label === label),
        [value, key] = found.cost.get(line).get(found.length);
      const group = mine[0] && zoo.select.groupOf(mine[0]);
      if (!mine.length || off.includes(group) || off.includes(line)) continue;
      const scores = mine.map(run => run.n.score),
        mean = scores.reduce((a, b) => a + b, 0) / scores.length;
      const name = label === line || !line.startsWith('full (') ? label : line;
      drawn.add(label);
      points.push(value);
      series.push({
        group,
        name,
        style: zoo.data.styles[line] ?? zoo.data.styles[label],
        mode: 'markers',
        size: 12,
        x: [value],
        y: [mean],
        ...(mine.length > 1 ? {low: [Math.min(...scores)], high: [Math.max(...scores)]} : {}),
        keys: [[...mine.map(run => run.key), key]],
        said: [
          `${name}\n${say(value)}\n${told(task)(mean)} ${task.words}` +
            (mine.length > 1 ? `, mean of ${mine.length} seeds` : ''),
        ],
      });
    }
    if (!points.length) return null;
    const bare = [...new Set(runs.map(run => run.label))].filter(label => !drawn.has(label));
    const note =
      `${task.title}: ${task.judged}, beside one call of one layer at ${words.count(found.length)} ` +
      `tokens (${found.setting}).` +
      (bare.length ? ` Not drawn, since no cost of theirs was measured there: ${bare.join(', ')}.` : '');
    return {
      note,
      choices,
      series,
      say: told(task),
      sayX: say,
      y: yOf(task, better(task)),
      x: zoo.gather.logAxis(
        `${unit} (lower is better)`,
        points,
        say,
        {binary, room: 0.12},
      ),
    };
  }
  zoo.charts.add({
    key: 'pareto-memory',
    title: 'Quality against memory',
    build: () => pareto('peak_bytes', 'peak bytes', true),
  });
  zoo.charts.add({
    key: 'pareto-time',
    title: 'Quality against time',
    build: () => pareto('seconds', 'seconds of one call', false),
  });
})();
