// What was trained short and tested long: quality by the length of the rows, and how much context models make use of.
(() => {
  const {told, ofTask, chosen, yOf, better} = zoo.tasks;
  const words = zoo.words;

  zoo.charts.add({
    key: 'lengths',
    title: 'Trained short, tested long',
    build: () => {
      const {task, choices} = chosen(run => run.by_length);
      const runs = task ? zoo.select.drawn(run => ofTask(task)(run) && run.by_length) : [];
      if (!runs.length) return null;
      const say = told(task);
      const series = runs.map(group => {
        const line = zoo.gather.means(
          group.runs.flatMap(run => run.by_length[0].map((length, i) => [length, run.by_length[1][i], run.key])),
        );
        const single = group.runs.length === 1;
        return {
          group: group.name,
          name: group.name,
          style: group.style,
          size: 7,
          ...line,
          low: single ? undefined : line.low,
          high: single ? undefined : line.high,
          said: line.x.map((length, i) =>
            [group.name, `${words.count(length)} tokens`, `${say(line.y[i])} ${task.words}`].join('\n'),
          ),
        };
      });
      const all = series.flatMap(each => each.x);
      const trained = [...new Set(runs.flatMap(group => group.runs.map(run => run.trained)))].filter(Boolean);
      return {
        choices,
        series,
        say,
        x: zoo.gather.lengths(all),
        y: yOf(task, better(task)),
        // shapes on logarithmic axes stand at the value itself
        shapes: trained.map(length => ({yref: 'paper', y0: 0, y1: 1, x0: length, x1: length})),
        note:
          `${task.title}: ${task.words} by the length of the evaluation rows, the mean over seeds. ` +
          `Dotted: the trained length${trained.length ? `, ${trained.map(words.count).join(', ')} tokens` : ''}. ` +
          'Sets of other text and sets scored under other options are left out; ' +
          'of several of one length the lowest counts.',
      };
    },
  });

  const files = () => zoo.data.contexts ?? [];

  // Runs of a measured group that the filters leave, each with its group and look.
  function read(file) {
    const {off} = zoo.state.get(),
      shown = new Set(zoo.select.shown().map(run => run.key));
    return file.runs
      .filter(run => run.key === null || shown.has(run.key))
      .map(run => {
        const known = zoo.byKey.get(run.key),
          group = known ? zoo.select.groupOf(known) : run.label;
        return {...run, group, style: zoo.select.looks()[group] ?? zoo.data.styles[run.label]};
      })
      .filter(run => !off.includes(run.group));
  }

  zoo.charts.add({
    key: 'context',
    title: 'How much context helps',
    build: () => {
      const file = files()[0],
        runs = file ? read(file) : [];
      if (!runs.length) return null;
      const hard = share => `gain at the hardest ${words.percent(share)}`;
      const kinds = [
        ['bits', 'bits per byte'],
        ...runs[0].reach.map(({share}) => [String(share), hard(share)]),
      ];
      const wanted = zoo.state.get().context,
        [what, title] = kinds.find(([each]) => each === wanted) ?? kinds[0];
      const bits = what === 'bits',
        place = Math.max(0, runs[0].reach.findIndex(({share}) => String(share) === what)),
        say = bits ? words.fixed : words.percent;
      const length = each => `${each.falls ? '' : '≥ '}${words.count(each.tokens)}`;
      const series = runs.map(run => {
        const y = bits ? run.bits : run.reach[place].gains;
        return {
          group: run.group,
          alone: run.key,
          name: run.label,
          style: run.style,
          size: 7,
          x: file.contexts.slice(0, y.length),
          y,
          keys: y.map(() => (run.key === null ? [] : [run.key])),
          said: y.map((value, i) =>
            [run.label, `${words.count(file.contexts[i])} tokens of context`, `${say(value)} ${title}`].join('\n'),
          ),
        };
      });
      const effective = runs.map(run => `${run.label} ${run.reach.map(length).join(' / ')}`).join(', ');
      return {
        series,
        say,
        x: {...zoo.gather.lengths(file.contexts), title: 'tokens of context'},
        y: {title: bits ? title : `${title} of the next longer context`},
        shapes: bits ? [] : [{xref: 'paper', x0: 0, x1: 1, y0: file.threshold, y1: file.threshold}],
        choices: [zoo.choice('What', kinds, what, context => zoo.state.change({context}))],
        note:
          `${file.title}: ${words.count(file.positions)} tokens of one text, each after exactly so many. ` +
          `Relative effective context (Dai et al. 2019) at the hardest ${runs[0].reach
            .map(({share}) => words.percent(share))
            .join(' / ')}, threshold ${words.percent(file.threshold)}: ${effective}. ` +
          'It is a figure of this group and these steps.',
      };
    },
  });
})();
