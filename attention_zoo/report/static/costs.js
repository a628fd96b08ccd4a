// Costs against length, and ours against other implementations.
(() => {
  const words = zoo.words,
    is = kind => run => zoo.ask(run, 'kind') === kind;
  const resident = 'resident set of the process';

  // Bytes and how they were found: as peak of tensors where that was observed.
  function memory(run) {
    if (run.n.peak_bytes && !run.why) return [run.n.peak_bytes, ''];
    if (run.n.predicted_bytes) return [run.n.predicted_bytes, 'predicted, not run'];
    return run.n.resident_bytes && !run.why ? [run.n.resident_bytes, resident] : [null, ''];
  }

  const ofSetting = setting => run => is('cost')(run) && zoo.ask(run, 'setting') === setting;

  function cost(figure, {title, unit, binary, phases}) {
    const {value: setting, left} = zoo.select.setting();
    if (!setting || phases !== /\b(prefill|decode)\b/.test(setting)) return null;
    const say = words.of(figure),
      series = [],
      failing = [],
      values = [],
      every = [];
    for (const group of zoo.select.drawn(ofSetting(setting))) {
      const observed = [],
        other = [],
        lost = [];
      for (const run of group.runs) {
        const length = Number(zoo.ask(run, 'length'));
        every.push(length);
        const [value, how] = figure === 'peak_bytes' ? memory(run) : [run.why ? null : (run.n[figure] ?? null), ''];
        if (run.why) lost.push([length, run]);
        if (value === null || run.why) continue;
        values.push(value);
        (how === resident ? other : observed).push([length, value, run.key]);
      }
      series.push(...lines(group, observed, other, figure, say));
      if (lost.length) failing.push({group, lost});
    }
    if (!values.length) return null;
    const y = zoo.gather.logAxis(unit, values, say, {binary, above: failing.length});
    failing.forEach(({group, lost}, number) =>
      series.push({
        group: group.name,
        name: group.name,
        style: group.style,
        mode: 'markers',
        marker: 'x-thin',
        size: 10,
        lost: 'did not finish',
        x: lost.map(([length]) => length),
        y: lost.map(() => 10 ** (y.top - y.step * (number + 0.5))),
        keys: lost.map(([, run]) => [run.key]),
        said: lost.map(
          ([length, run]) => `${group.name}\n${words.count(length)} tokens: ${run.why}\n${run.error ?? ''}`,
        ),
      }),
    );
    const notes = [`${setting[0].toUpperCase()}${setting.slice(1)}. Both axes logarithmic.`];
    if (series.some(each => each.dash === 'dot' && each.marker?.endsWith('-open-dot'))) {
      notes.push(
        'Hollow with a dot: by the resident set of the process, since calls of that length are ' +
          'not observed tensor by tensor; not to be compared with the rest.',
      );
    }
    if (failing.length)
      notes.push('A cross at the top did not finish, or was predicted not to; its height means nothing.');
    return {note: notes.join(' '), x: zoo.gather.lengths(every), y, series, say, choices: settings(left, setting)};
  }

  const settings = (left, setting) =>
    left.length < 2
      ? []
      : [
          zoo.choice(
            'Setting',
            left.map(each => [each, each]),
            setting,
            value => zoo.state.change({setting: value}),
          ),
        ];

  function lines(group, observed, other, figure, say) {
    const found = [];
    if (observed.length) {
      const mean = zoo.gather.means(observed),
        runs = mean.keys.map(keys => keys.map(key => zoo.byKey.get(key)));
      const ends =
        figure === 'seconds' && runs.every(each => each.every(run => run.n.seconds_min && run.n.seconds_max));
      const low = ends ? runs.map(each => Math.min(...each.map(run => run.n.seconds_min))) : mean.low;
      const high = ends ? runs.map(each => Math.max(...each.map(run => run.n.seconds_max))) : mean.high;
      const spread = ends || mean.counts.some(count => count > 1);
      found.push({
        group: group.name,
        name: group.name,
        style: group.style,
        ...mean,
        low: spread ? low : undefined,
        high: spread ? high : undefined,
        said: mean.x.map((x, i) =>
          [
            group.name,
            `${words.count(x)} tokens: ${say(mean.y[i])}`,
            spread ? `${say(low[i])} to ${say(high[i])}` : '',
            mean.counts[i] > 1 ? `${mean.counts[i]} runs` : '',
          ]
            .filter(Boolean)
            .join('\n'),
        ),
      });
    }
    if (other.length) {
      const mean = zoo.gather.means(other);
      found.push({
        group: group.name,
        name: group.name,
        style: group.style,
        x: mean.x,
        y: mean.y,
        keys: mean.keys,
        dash: 'dot',
        width: 1,
        marker: `${group.style[2].replace('-open', '')}-open-dot`,
        said: mean.x.map((x, i) => `${group.name}\n${words.count(x)} tokens: ${say(mean.y[i])}\nby resident set`),
      });
    }
    return found;
  }

  zoo.memory = memory;
  zoo.ofSetting = ofSetting;
  zoo.settingChoice = settings;
  zoo.charts.add({
    key: 'memory',
    title: 'Memory against length',
    build: () => cost('peak_bytes', {unit: 'peak bytes of tensors', binary: true, phases: false}),
  });
  zoo.charts.add({
    key: 'time',
    title: 'Time against length',
    build: () => cost('seconds', {unit: 'seconds of one call (median)', binary: false, phases: false}),
  });
  zoo.charts.add({
    key: 'state',
    title: 'State against context',
    build: () => cost('state_bytes', {unit: 'bytes carried to the next call', binary: true, phases: true}),
  });
  zoo.charts.add({
    key: 'rate',
    title: 'Speed against context',
    build: () => cost('tokens_per_second', {unit: 'tokens a second (median)', binary: false, phases: true}),
  });

  zoo.charts.add({
    key: 'peers',
    title: 'Ours and theirs',
    build: () => {
      const series = [],
        values = {x: [1], y: [1]};
      for (const group of zoo.select.drawn(is('peer'))) {
        const runs = group.runs.filter(run => run.n.time_ratio && run.n.memory_ratio);
        if (!runs.length) continue;
        values.x.push(...runs.map(run => run.n.memory_ratio));
        values.y.push(...runs.map(run => run.n.time_ratio));
        series.push({
          group: group.name,
          name: group.name,
          style: group.style,
          mode: 'markers',
          size: 9,
          x: runs.map(run => run.n.memory_ratio),
          y: runs.map(run => run.n.time_ratio),
          keys: runs.map(run => [run.key]),
          said: runs.map(
            run =>
              `${run.label} against ${run.against}\n${run.setting}, ${words.count(zoo.ask(run, 'length'))} tokens\n` +
              `${words.times(run.n.time_ratio)} faster, ${words.times(run.n.memory_ratio)} less memory`,
          ),
        });
      }
      if (!series.length) return null;
      return {
        note: 'To the right and above the dotted lines ours is smaller and faster.',
        series,
        say: words.times,
        sayX: words.times,
        x: zoo.gather.logAxis('times less memory than theirs', values.x, words.times, {room: 0.12}),
        y: zoo.gather.logAxis('times faster than theirs', values.y, words.times, {room: 0.12}),
        shapes: [
          {xref: 'paper', x0: 0, x1: 1, y0: 1, y1: 1},
          {yref: 'paper', y0: 0, y1: 1, x0: 1, x1: 1},
        ],
      };
    },
  });
})();
