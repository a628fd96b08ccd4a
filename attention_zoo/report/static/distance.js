// Accuracy by length and distance as a heat map, and what models say of themselves.
(() => {
  const {ofTask, seed, chosen, log2} = zoo.tasks;
  const words = zoo.words;

  // The evaluation sets of a run, that of its result first, with the tokens of their rows.
  function sets(run) {
    const task = zoo.select.taskOf(zoo.ask(run, 'task'));
    const own = {set: task?.sets[0] ?? '', length: Number(zoo.ask(run, 'length')), groups: run.groups};
    const others = Object.entries(run.others ?? {}).map(([set, each]) => ({set, ...each}));
    return [own, ...others];
  }

  const along = run => (run.by_length?.[0] ?? []).map((length, i) => [length, run.by_length[1][i]]);

  // Which heat maps there are: evaluation sets, and what answers are told apart by, such as distance.
  function maps(task) {
    const found = new Map();
    for (const run of zoo.select.shown().filter(ofTask(task))) {
      for (const {groups} of sets(run))
        for (const name of Object.keys(groups ?? {})) found.set(name, name.replace(/_/g, ' '));
      if (run.by_length) found.set('(length)', 'length of the rows');
      if (Object.keys(run.sets ?? {}).length > 1) found.set('(set)', 'evaluation set');
    }
    return [...found].sort(
      ([a], [b]) => (a !== 'distance') - (b !== 'distance') || a.startsWith('(') - b.startsWith('('),
    );
  }

  // Names that tell lines apart: with more said of those that stand there twice, of the first of them too where `all`.
  function apart(names, more, all) {
    const twice = names.map(name => names.indexOf(name) !== names.lastIndexOf(name));
    return names.map((name, i) => (twice[i] && (all || names.indexOf(name) !== i) ? name + more(i) : name));
  }

  zoo.charts.add({
    key: 'distance',
    title: 'Accuracy by length and distance',
    wide: true,
    build: () => {
      const {task, choices} = chosen(
        run => sets(run).some(each => each.groups) || Object.keys(run.sets ?? {}).length > 1,
      );
      const kinds = task ? maps(task) : [];
      if (!kinds.length) return null;
      const wanted = zoo.state.get().grouping,
        [name, title] = kinds.find(([each]) => each === wanted) ?? kinds[0],
        whole = name.startsWith('(');
      // the same task at several lengths stands in one map, a line for each mechanism and length
      const alike = zoo.data.tasks.filter(each => each.name === task.name && each.metric === task.metric);
      const lines = [];
      for (const other of alike) {
        for (const group of zoo.select.drawn(ofTask(other))) {
          if (whole) {
            const points = group.runs.flatMap(run =>
              (name === '(set)' ? Object.entries(run.sets ?? {}) : along(run)).map(pair => [...pair, run.key]),
            );
            if (points.length)
              lines.push({
                group: group.name,
                length: Number(zoo.ask(group.runs[0], 'length')),
                set: '',
                task: other,
                ...zoo.gather.means(points),
              });
            continue;
          }
          // a line for each set, since mechanisms that look alike near by come apart where rows are longer
          const found = new Map();
          for (const run of group.runs)
            for (const {set, length, groups} of sets(run))
              for (const [at, hit, loss] of groups?.[name] ?? []) {
                if (!found.has(set)) found.set(set, {length, points: []});
                found.get(set).points.push([at, task.lower ? loss * (task.bits ? 1 / log2 : 1) : hit, run.key]);
              }
          for (const [set, {length, points}] of found)
            lines.push({group: group.name, length, set, task: other, ...zoo.gather.means(points)});
        }
      }
      if (!lines.length) return null;
      lines.sort((a, b) => zoo.order(b.group, a.group) || zoo.order(b.length, a.length));
      const several = new Set(lines.map(line => line.length)).size > 1;
      const x = [...new Set(lines.flatMap(line => line.x))].sort(zoo.order);
      const say = task.lower ? words.fixed : words.percent,
        z = lines.map(line => x.map(at => (line.x.includes(at) ? line.y[line.x.indexOf(at)] : null)));
      const y = lines.map(line => (several ? `${line.group} · ${words.count(line.length)} tokens` : line.group));
      const flat = z.flat().filter(value => value !== null),
        named = apart(y, i => ` · ${lines[i].set.replace(/_/g, ' ')}`, true),
        doubled = apart(named, i => ` (${lines[i].task.title})`, false);
      const what = whole ? task.words : task.lower ? 'loss' : 'accuracy';
      const unit = what !== 'loss' ? '' : task.bits ? ' in bits' : ' in nats';
      return {
        choices: [
          ...choices,
          ...(kinds.length > 1 ? [zoo.choice('By', kinds, name, grouping => zoo.state.change({grouping}))] : []),
        ],
        title: `${what[0].toUpperCase()}${what.slice(1)} by ${several ? 'length and ' : ''}${title}`,
        note: `${task.name}: ${what}${unit} by ${title}, the mean over seeds. A column is the largest of its group.`,
        height: Math.min(640, 110 + 26 * lines.length),
        say,
        x: {title, type: 'category'},
        y: {title: '', type: 'category', automargin: true},
        series: [],
        heat: {
          x: x.map(at => (typeof at === 'number' ? words.count(at) : at)),
          y: doubled,
          z,
          min: task.lower ? Math.min(...flat) : 0,
          max: task.lower ? Math.max(...flat) : 1,
          lower: task.lower,
          share: !task.lower,
          say,
          groups: lines.map(each => each.group),
          keys: lines.map(each => x.map(at => each.keys[each.x.indexOf(at)] ?? [])),
          said: lines.map((each, i) =>
            x.map((at, j) => (z[i][j] === null ? '' : `${doubled[i]}\n${title} ${at}: ${say(z[i][j])}`)),
          ),
        },
      };
    },
  });

  zoo.charts.add({
    key: 'spans',
    title: 'What models say of themselves',
    build: () => {
      const {task, choices} = chosen(run => run.readings);
      const runs = task ? zoo.select.drawn(run => ofTask(task)(run) && run.readings) : [];
      if (!runs.length) return null;
      const last = name => name.split('.').pop();
      const kinds = [
        ...new Set(runs.flatMap(group => group.runs.flatMap(run => Object.keys(run.readings).map(last)))),
      ];
      const wanted = zoo.state.get().attend,
        what = kinds.includes(wanted) ? wanted : kinds[0],
        series = [];
      for (const group of runs)
        for (const run of group.runs) {
          const places = Object.entries(run.readings).filter(([name]) => last(name) === what);
          places.forEach(([, [steps, ...heads]], layer) =>
            heads.forEach((values, head) =>
              series.push({
                group: group.name,
                alone: run.key,
                name: `${group.name}, ${seed(run)}, layer ${layer + 1}, head ${head + 1}`,
                style: group.style,
                width: 1.2,
                size: 5,
                mode: steps.length > 1 ? 'lines' : 'markers',
                x: steps,
                y: values,
                keys: steps.map(() => [run.key]),
                said: values.map((value, i) =>
                  [
                    `${group.name}, ${seed(run)}`,
                    `layer ${layer + 1}, head ${head + 1}`,
                    `step ${words.count(steps[i])}: ${words.fixed(value)}`,
                  ].join('\n'),
                ),
              }),
            ),
          );
        }
      if (!series.length) return null;
      return {
        series,
        x: {title: 'step'},
        y: {title: what.replace(/_/g, ' ')},
        note: `${task.title}: ${what.replace(/_/g, ' ')}, a line for each head of each layer, read at the evaluations.`,
        choices: [
          ...choices,
          ...(kinds.length > 1
            ? [
                zoo.choice(
                  'What',
                  kinds.map(kind => [kind, kind.replace(/_/g, ' ')]),
                  what,
                  attend => zoo.state.change({attend}),
                ),
              ]
            : []),
        ],
      };
    },
  });
})();
