// What was learnt: quality over seeds, quality beside cost, courses of training, loss by position, accuracy by distance.
(() => {
  const words = zoo.words, log2 = Math.log(2);
  const told = task => task.share ? words.percent : words.fixed;
  const ofTask = task => run => zoo.ask(run, 'kind') === 'training' && zoo.ask(run, 'task') === task.title;
  const known = task => run => ofTask(task)(run) && !run.why && run.n.score !== undefined;
  const better = task => `${task.words} (${task.lower ? 'lower' : 'higher'} is better)`;
  const seed = run => `seed ${zoo.ask(run, 'seed') ?? '?'}`;

  // The task that a chart is of: the chosen one, or the first that holds what it draws; and a choice where several do.
  function chosen(holds) {
    const {left} = zoo.select.task(), wanted = zoo.state.get().task;
    const runs = zoo.select.shown().filter(holds);
    const able = left.filter(title => runs.some(run => zoo.ask(run, 'task') === title));
    const value = left.includes(wanted) ? able.find(title => title === wanted) : able[0];
    if (!value) return {};
    const choices = able.length < 2 ? [] : [zoo.choice('Task', able.map(each => [each, each]), value, task => zoo.state.change({task}))];
    return {task: zoo.select.taskOf(value), choices};
  }

  const yOf = (task, title) => task.share ? zoo.gather.share(title) : {title};
  const caution = task => task.obstacles.length ? ` Not ranked: ${task.obstacles.join('; ')}.` : '';

  zoo.charts.add({key: 'quality', title: 'Quality over seeds', build: () => {
    const {task, choices} = chosen(run => run.n.score !== undefined);
    if (!task) return null;
    const most = innerWidth < 700 ? 18 : 40, short = new Set(), place = name => {
      let text = name.length > most ? `${name.slice(0, most - 1)}…` : name;
      while (short.has(text)) text += ' ';
      short.add(text);
      return text;
    };
    const series = zoo.select.drawn(known(task)).map(group => {
      const at = place(group.name);
      return {group: group.name, name: group.name, style: group.style, mode: 'markers', size: 10, y: group.runs.map(() => at),
        x: group.runs.map(run => run.n.score), keys: group.runs.map(run => [run.key]),
        said: group.runs.map(run => `${group.name}\n${told(task)(run.n.score)} ${task.words}\n${seed(run)}`)};
    });
    if (!series.length) return null;
    // bars that are far from all runs would squeeze them into a corner: those are told, not drawn
    const scores = series.flatMap(each => each.x), [low, high] = [Math.min(...scores), Math.max(...scores)];
    const bars = Object.entries(task.bars), room = Math.max(high - low, 0.02 * Math.abs(high), 1e-6);
    const near = bars.filter(([, value]) => task.share || (value > low - room && value < high + room));
    const ends = [...scores, ...near.map(([, value]) => value)];
    const range = [Math.min(...ends) - 0.08 * room, Math.max(...ends) + 0.08 * room];
    const note = `${task.title}: ${task.judged}, a mark for each run.${bars.length ? ` Needs no model: ${bars.map(([name, value]) =>
      `${name} ${told(task)(value)}`).join(', ')}${near.length ? ' (dotted)' : ''}.` : ''}${caution(task)}`;
    return {note, choices, series, say: String, sayX: told(task), height: Math.min(900, 90 + 24 * series.length),
      y: {title: '', type: 'category', autorange: 'reversed'}, x: task.share ? zoo.gather.share(better(task)) : {title: better(task), range},
      shapes: near.map(([, value]) => ({yref: 'paper', y0: 0, y1: 1, x0: value, x1: value}))};
  }});

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
    const common = pairs.map(([, line]) => [...cost.get(line).keys()]).reduce((a, b) => a.filter(each => b.includes(each)));
    return common.length ? {length: Math.max(...common), pairs, cost, ranked: beside.ranked, setting} : null;
  }

  // Points that no other beats in both, cheapest first.
  function front(points, lower) {
    const kept = [];
    for (const [x, y] of [...points].sort((a, b) => a[0] - b[0] || (lower ? a[1] - b[1] : b[1] - a[1]))) {
      const last = kept[kept.length - 1];
      if (!last || (lower ? y < last[1] : y > last[1])) kept.push([x, y]);
    }
    return kept;
  }

  function pareto(figure, unit, binary) {
    const {task, choices} = chosen(run => run.n.score !== undefined);
    const found = task && priced(task, figure);
    if (!found) return null;
    const say = words.of(figure), series = [], points = [], drawn = new Set();
    const {off} = zoo.state.get(), runs = zoo.select.shown().filter(known(task));
    for (const [label, line] of found.pairs) {
      const mine = runs.filter(run => run.label === label), [value, key] = found.cost.get(line).get(found.length);
      const group = mine[0] && zoo.select.groupOf(mine[0]);
      if (!mine.length || off.includes(group) || off.includes(line)) continue;
      const scores = mine.map(run => run.n.score), mean = scores.reduce((a, b) => a + b, 0) / scores.length;
      const name = label === line || !line.startsWith('full (') ? label : line;
      drawn.add(label);
      points.push([value, mean]);
      series.push({group, name, style: zoo.data.styles[line] ?? zoo.data.styles[label], mode: 'markers', size: 12, x: [value], y: [mean],
        ...(mine.length > 1 ? {low: [Math.min(...scores)], high: [Math.max(...scores)]} : {}), keys: [[...mine.map(run => run.key), key]],
        said: [`${name}\n${say(value)}\n${told(task)(mean)} ${task.words}${mine.length > 1 ? `, mean of ${mine.length} seeds` : ''}`]});
    }
    if (!points.length) return null;
    if (found.ranked) {
      const edge = front(points, task.lower);
      series.push({name: 'front', style: null, mode: 'lines', width: 1, shape: 'hv', dash: 'solid', x: edge.map(([x]) => x), y: edge.map(([, y]) => y)});
    }
    const bare = [...new Set(runs.map(run => run.label))].filter(label => !drawn.has(label));
    const note = `${task.title}: ${task.judged}, beside one call of one layer at ${words.count(found.length)} tokens (${found.setting}).`
      + `${bare.length ? ` Not drawn, since no cost of theirs was measured there: ${bare.join(', ')}.` : ''}${found.ranked ? '' : ' No front is drawn, since nothing may be ranked here.'}`;
    return {note, choices, series, say: told(task), sayX: say, y: yOf(task, better(task)),
      x: zoo.gather.logAxis(`${unit} (lower is better)`, points.map(([x]) => x), say, {binary, room: 0.12})};
  }
  zoo.charts.add({key: 'pareto-memory', title: 'Quality against memory', build: () => pareto('peak_bytes', 'peak bytes', true)});
  zoo.charts.add({key: 'pareto-time', title: 'Quality against time', build: () => pareto('seconds', 'seconds of one call', false)});

  // Curves of each group: the mean over its seeds with the range as a band, and the chosen run by itself.
  function courses(runs, pick, said, x) {
    const series = [];
    for (const group of runs) {
      const many = group.runs.map(run => ({...pick(run), key: run.key}));
      const mean = zoo.gather.curves(many);
      const single = many.length === 1;
      series.push({group: group.name, name: group.name, style: group.style, mode: mean.x.length > 1 ? 'lines' : 'markers', band: true, size: 6,
        ...mean, low: single ? undefined : mean.low, high: single ? undefined : mean.high,
        said: mean.x.map((at, i) => [group.name, `${x} ${words.count(at)}: ${said(mean.y[i])}`,
          mean.counts[i] > 1 ? `${said(mean.low[i])} to ${said(mean.high[i])} over ${mean.counts[i]} runs` : ''].filter(Boolean).join('\n'))});
      const mine = many.find(each => each.key === zoo.state.get().run);
      if (mine && !single) {
        series.push({group: group.name, alone: mine.key, name: `${group.name}, chosen`, style: group.style, mode: 'lines', width: 3, dash: 'dot', x: mine.x, y: mine.y,
          keys: mine.x.map(() => [mine.key]), said: mine.x.map((at, i) => `${group.name}, the chosen run\n${x} ${words.count(at)}: ${said(mine.y[i])}`)});
      }
    }
    return series;
  }

  zoo.charts.add({key: 'learning', title: 'Training curves', build: () => {
    const {task, choices} = chosen(run => run.curve || run.quality_curve);
    if (!task) return null;
    const held = name => zoo.select.drawn(run => ofTask(task)(run) && run[name]?.[0]?.length);
    const kinds = [['curve', 'training loss'], ['quality_curve', `${task.words} while training`]].filter(([name]) => held(name).length);
    if (!kinds.length) return null;
    const wanted = zoo.state.get().learning, name = kinds.some(([each]) => each === wanted) ? wanted : kinds[0][0];
    const loss = name === 'curve', factor = loss && task.metric === 'bits_per_byte' ? 1 / log2 : 1;
    const say = loss ? words.fixed : told(task);
    const series = courses(held(name), run => ({x: run[name][0], y: run[name][1].map(value => value * factor)}), say, 'step');
    const unit = loss ? (factor === 1 ? 'loss in nats' : 'loss in bits per byte') : task.words;
    return {series, say, x: {title: 'step'}, y: loss ? {title: unit} : yOf(task, unit),
      note: `${task.title}: the mean over seeds, the band from the least to the most. Long curves are thinned; results.jsonl holds all.`,
      choices: [...choices, ...(kinds.length > 1 ? [zoo.choice('Curve', kinds, name, learning => zoo.state.change({learning}))] : [])]};
  }});

  zoo.charts.add({key: 'position', title: 'Loss by position', build: () => {
    const {task, choices} = chosen(run => run.loss_by_position);
    const runs = task ? zoo.select.drawn(run => ofTask(task)(run) && run.loss_by_position?.[0]?.length) : [];
    if (!runs.length) return null;
    const bits = task.metric === 'bits_per_byte', factor = bits ? 1 / log2 : 1;
    return {choices, series: courses(runs, run => ({x: run.loss_by_position[0], y: run.loss_by_position[1].map(value => value * factor)}), words.fixed, 'position'),
      x: {title: 'tokens read before'}, y: {title: bits ? 'loss in bits per byte' : 'loss in nats'}, say: words.fixed,
      note: `${task.title}: loss by how much of the text came before. A mechanism that carries state reads on over segments; the others start each segment afresh.`};
  }});

  // Which heat maps there are: evaluation sets, and what answers are told apart by, such as distance.
  function maps(task) {
    const found = new Map();
    for (const run of zoo.select.shown().filter(ofTask(task))) {
      for (const name of Object.keys(run.groups ?? {})) found.set(name, name.replace(/_/g, ' '));
      if (Object.keys(run.sets ?? {}).length > 1) found.set('(set)', 'evaluation set');
    }
    return [...found].sort(([a], [b]) => (a !== 'distance') - (b !== 'distance') || (a === '(set)') - (b === '(set)'));
  }

  zoo.charts.add({key: 'distance', title: 'Accuracy by length and distance', wide: true, build: () => {
    const {task, choices} = chosen(run => run.groups || Object.keys(run.sets ?? {}).length > 1);
    const kinds = task ? maps(task) : [];
    if (!kinds.length) return null;
    const wanted = zoo.state.get().grouping, [name, title] = kinds.find(([each]) => each === wanted) ?? kinds[0];
    // the same task at several lengths stands in one map, a line for each mechanism and length
    const alike = zoo.data.tasks.filter(each => each.name === task.name && each.metric === task.metric);
    const lines = [];
    for (const other of alike) {
      for (const group of zoo.select.drawn(ofTask(other))) {
        const points = group.runs.flatMap(run => name === '(set)'
          ? Object.entries(run.sets ?? {}).map(([set, value]) => [set, value, run.key])
          : (run.groups?.[name] ?? []).map(([at, hit, loss]) => [at, task.lower ? loss * (task.bits ? 1 / log2 : 1) : hit, run.key]));
        if (points.length) lines.push({group: group.name, length: zoo.ask(group.runs[0], 'length'), task: other, ...zoo.gather.means(points)});
      }
    }
    if (!lines.length) return null;
    lines.sort((a, b) => zoo.order(b.group, a.group) || zoo.order(b.length, a.length));
    const several = new Set(lines.map(line => line.length)).size > 1;
    const x = [...new Set(lines.flatMap(line => line.x))].sort(zoo.order);
    const say = task.lower ? words.fixed : words.percent, z = lines.map(line => x.map(at => line.x.includes(at) ? line.y[line.x.indexOf(at)] : null));
    const y = lines.map(line => several ? `${line.group} · ${words.count(line.length)} tokens` : line.group);
    const flat = z.flat().filter(value => value !== null), doubled = y.map((text, i) => y.indexOf(text) === i ? text : `${text} (${line(i)})`);
    function line(i) { return lines[i].task.title; }
    return {choices: [...choices, ...(kinds.length > 1 ? [zoo.choice('By', kinds, name, grouping => zoo.state.change({grouping}))] : [])],
      title: `${task.lower ? 'Loss' : name === '(set)' ? `${task.words[0].toUpperCase()}${task.words.slice(1)}` : 'Accuracy'} by ${several ? 'length and ' : ''}${title}`,
      note: `${task.name}: ${task.lower ? (task.bits ? 'loss in bits' : 'loss in nats') : name === '(set)' ? task.words : 'accuracy'} by ${title}, the mean over seeds. A column is the largest of its group.`,
      height: Math.min(640, 110 + 26 * lines.length), say, x: {title, type: 'category'}, y: {title: '', type: 'category', automargin: true}, series: [],
      heat: {x: x.map(at => typeof at === 'number' ? words.count(at) : at), y: doubled, z, min: task.lower ? Math.min(...flat) : 0, max: task.lower ? Math.max(...flat) : 1,
        lower: task.lower, share: !task.lower, say, groups: lines.map(each => each.group),
        keys: lines.map(each => x.map(at => each.keys[each.x.indexOf(at)] ?? [])),
        said: lines.map((each, i) => x.map((at, j) => z[i][j] === null ? '' : `${doubled[i]}\n${title} ${at}: ${say(z[i][j])}`))}};
  }});

  zoo.charts.add({key: 'spans', title: 'What models say of themselves', build: () => {
    const {task, choices} = chosen(run => run.readings);
    const runs = task ? zoo.select.drawn(run => ofTask(task)(run) && run.readings) : [];
    if (!runs.length) return null;
    const last = name => name.split('.').pop();
    const kinds = [...new Set(runs.flatMap(group => group.runs.flatMap(run => Object.keys(run.readings).map(last))))];
    const wanted = zoo.state.get().attend, what = kinds.includes(wanted) ? wanted : kinds[0], series = [];
    for (const group of runs) for (const run of group.runs) {
      const places = Object.entries(run.readings).filter(([name]) => last(name) === what);
      places.forEach(([, [steps, ...heads]], layer) => heads.forEach((values, head) => series.push({
        group: group.name, alone: run.key, name: `${group.name}, ${seed(run)}, layer ${layer + 1}, head ${head + 1}`, style: group.style, width: 1.2, size: 5,
        mode: steps.length > 1 ? 'lines' : 'markers', x: steps, y: values, keys: steps.map(() => [run.key]),
        said: values.map((value, i) => `${group.name}, ${seed(run)}\nlayer ${layer + 1}, head ${head + 1}\nstep ${words.count(steps[i])}: ${words.fixed(value)}`)})));
    }
    if (!series.length) return null;
    return {series, x: {title: 'step'}, y: {title: what.replace(/_/g, ' ')}, note: `${task.title}: ${what.replace(/_/g, ' ')}, one line for each head of each layer, as read at the evaluations.`,
      choices: [...choices, ...(kinds.length > 1 ? [zoo.choice('What', kinds.map(kind => [kind, kind.replace(/_/g, ' ')]), what, attend => zoo.state.change({attend}))] : [])]};
  }});
})();
