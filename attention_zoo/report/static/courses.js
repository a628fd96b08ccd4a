// Courses of training with bands over seeds, and loss by position.
(() => {
  const {told, ofTask, chosen, yOf, log2} = zoo.tasks;
  const words = zoo.words;

  // Curves of each group: the mean over its seeds with the range as a band, and the chosen run by itself.
  function courses(runs, pick, said, x) {
    const series = [];
    for (const group of runs) {
      const many = group.runs.map(run => ({...pick(run), key: run.key}));
      const mean = zoo.gather.curves(many);
      const single = many.length === 1;
      series.push({
        group: group.name,
        name: group.name,
        style: group.style,
        mode: mean.x.length > 1 ? 'lines' : 'markers',
        band: true,
        size: 6,
        ...mean,
        low: single ? undefined : mean.low,
        high: single ? undefined : mean.high,
        said: mean.x.map((at, i) =>
          [
            group.name,
            `${x} ${words.count(at)}: ${said(mean.y[i])}`,
            mean.counts[i] > 1 ? `${said(mean.low[i])} to ${said(mean.high[i])} over ${mean.counts[i]} runs` : '',
          ]
            .filter(Boolean)
            .join('\n'),
        ),
      });
      const mine = many.find(each => each.key === zoo.state.get().run);
      if (mine && !single) {
        series.push({
          group: group.name,
          alone: mine.key,
          name: `${group.name}, chosen`,
          style: group.style,
          mode: 'lines',
          width: 3,
          dash: 'dot',
          x: mine.x,
          y: mine.y,
          keys: mine.x.map(() => [mine.key]),
          said: mine.x.map((at, i) => `${group.name}, the chosen run\n${x} ${words.count(at)}: ${said(mine.y[i])}`),
        });
      }
    }
    return series;
  }

  zoo.charts.add({
    key: 'learning',
    title: 'Training curves',
    build: () => {
      const {task, choices} = chosen(run => run.curve || run.quality_curve);
      if (!task) return null;
      const held = name => zoo.select.drawn(run => ofTask(task)(run) && run[name]?.[0]?.length);
      const kinds = [
        ['curve', 'training loss'],
        ['quality_curve', `${task.words} while training`],
      ].filter(([name]) => held(name).length);
      if (!kinds.length) return null;
      const wanted = zoo.state.get().learning,
        name = kinds.some(([each]) => each === wanted) ? wanted : kinds[0][0];
      const loss = name === 'curve',
        factor = loss && task.metric === 'bits_per_byte' ? 1 / log2 : 1;
      const say = loss ? words.fixed : told(task);
      const series = courses(
        held(name),
        run => ({x: run[name][0], y: run[name][1].map(value => value * factor)}),
        say,
        'step',
      );
      const unit = loss ? (factor === 1 ? 'loss in nats' : 'loss in bits per byte') : task.words;
      return {
        series,
        say,
        x: {title: 'step'},
        y: loss ? {title: unit} : yOf(task, unit),
        note:
          `${task.title}: the mean over seeds, the band from the least to the most. ` +
          'Long curves are thinned; results.jsonl holds all.',
        choices: [
          ...choices,
          ...(kinds.length > 1 ? [zoo.choice('Curve', kinds, name, learning => zoo.state.change({learning}))] : []),
        ],
      };
    },
  });

  zoo.charts.add({
    key: 'position',
    title: 'Loss by position',
    build: () => {
      const {task, choices} = chosen(
        run => run.loss_by_position || Object.values(run.others ?? {}).some(each => each.position),
      );
      if (!task) return null;
      const of = name => run => (name === task.sets[0] ? run.loss_by_position : run.others?.[name]?.position);
      const held = name => zoo.select.drawn(run => ofTask(task)(run) && of(name)(run)?.[0]?.length);
      const kinds = [...new Set([task.sets[0], ...task.sets])].filter(name => held(name).length);
      if (!kinds.length) return null;
      const wanted = zoo.state.get().set,
        set = kinds.includes(wanted) ? wanted : kinds[0],
        runs = held(set);
      const bits = task.metric === 'bits_per_byte',
        factor = bits ? 1 / log2 : 1;
      const spoken = name => name.replace(/_/g, ' ');
      return {
        choices: [
          ...choices,
          ...(kinds.length > 1
            ? [
                zoo.choice(
                  'Set',
                  kinds.map(name => [name, spoken(name)]),
                  set,
                  name => zoo.state.change({set: name}),
                ),
              ]
            : []),
        ],
        series: courses(
          runs,
          run => ({x: of(set)(run)[0], y: of(set)(run)[1].map(value => value * factor)}),
          words.fixed,
          'position',
        ),
        x: {title: 'tokens read before'},
        y: {title: bits ? 'loss in bits per byte' : 'loss in nats'},
        say: words.fixed,
        note:
          `${task.title}${kinds.length > 1 ? `, set ${spoken(set)}` : ''}: loss by how much of the text came before. ` +
          'A mechanism that carries state reads on over segments; the others start each segment afresh.',
      };
    },
  });
})();
