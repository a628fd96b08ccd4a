// Which runs are shown, how they are grouped, and how groups look.
zoo.select = (() => {
  let kept = {};

  // Forget what was worked out for another state.
  const renew = () => {
    kept = {};
  };
  const once = (name, work) => (name in kept ? kept[name] : (kept[name] = work()));

  function passes(run, where, words, but) {
    for (const [field, values] of Object.entries(where)) {
      if (field !== but && !values.includes(zoo.ask(run, field) ?? '')) return false;
    }
    return words.every(word => run.text.includes(word) || (word.includes('=') && run.named.includes(word)));
  }

  const words = () => zoo.state.get().q.toLowerCase().split(/\s+/).filter(Boolean);

  const shown = () =>
    once('shown', () => {
      const {where} = zoo.state.get(),
        asked = words();
      return zoo.runs.filter(run => passes(run, where, asked));
    });

  // How many runs there are of each value of a field, under all other filters.
  const counts = field =>
    once(`counts ${field}`, () => {
      const {where} = zoo.state.get(),
        asked = words(),
        found = new Map();
      for (const run of zoo.runs) {
        const value = zoo.ask(run, field) ?? '';
        found.set(value, (found.get(value) ?? 0) + passes(run, where, asked, field));
      }
      return [...found].sort(([a], [b]) => zoo.order(a, b));
    });

  const groupOf = run => zoo.ask(run, zoo.state.get().by) ?? '(none)';

  // The looks of all groups, of what is not shown too: a filter repaints nothing.
  const looks = () =>
    once('looks', () => {
      const {by} = zoo.state.get();
      if (by === 'label') return zoo.data.styles;
      const found = {},
        names = [...new Set(zoo.runs.map(groupOf))].sort(zoo.order);
      const palette = zoo.palette,
        markers = zoo.markers;
      if (by === 'mechanism') {
        for (const run of zoo.runs) found[groupOf(run)] ??= zoo.data.styles[run.label];
        return found;
      }
      names.forEach((name, number) => {
        const [color, dark] = palette[number % palette.length];
        const round = Math.floor(number / palette.length);
        found[name] = [color, dark, markers[(number + round) % markers.length], ['solid', 'dash', 'dot'][round % 3]];
      });
      return found;
    });

  // Groups of shown runs, full attention first, each with its look.
  const groups = () =>
    once('groups', () => {
      const found = new Map();
      for (const run of shown()) {
        const name = groupOf(run);
        if (!found.has(name)) found.set(name, []);
        found.get(name).push(run);
      }
      const first = name => (/^full\b/.test(name) ? 0 : 1);
      return [...found]
        .sort(([a], [b]) => first(a) - first(b) || zoo.order(a, b))
        .map(([name, runs]) => ({name, runs, style: looks()[name]}));
    });

  // Runs of a kind that hold something, by group; groups that were switched off in the legend are left out.
  const drawn = keep => {
    const {off} = zoo.state.get();
    return groups()
      .filter(group => !off.includes(group.name))
      .map(group => ({...group, runs: group.runs.filter(keep)}))
      .filter(group => group.runs.length);
  };

  // The value of a choice that the shown runs leave: what was chosen, or the first of the known ones.
  const chosen = (name, known) => {
    const there = new Set(shown().map(run => zoo.ask(run, name)));
    const left = known.filter(value => there.has(value));
    const wanted = zoo.state.get()[name];
    return {left, value: left.includes(wanted) ? wanted : left[0]};
  };
  const setting = () => once('setting', () => chosen('setting', zoo.data.settings));
  const task = () =>
    once('task', () =>
      chosen(
        'task',
        zoo.data.tasks.map(each => each.title),
      ),
    );
  const taskOf = title => zoo.data.tasks.find(each => each.title === title);

  return {renew, shown, counts, groups, groupOf, drawn, setting, task, taskOf, looks};
})();

zoo.palette = [];
zoo.markers = ['circle', 'square', 'diamond', 'triangle-up', 'hexagon', 'triangle-down', 'star', 'cross'];
