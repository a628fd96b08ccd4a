// Runs to points: values of a group at the same place become one, with the range over its seeds.
zoo.gather = (() => {
  // [[x, value, key], ...] -> columns sorted by x: the mean of each x, and from the least to the most.
  function means(points) {
    const found = new Map();
    for (const [x, value, key] of points) {
      if (!found.has(x)) found.set(x, {values: [], keys: []});
      const held = found.get(x);
      held.values.push(value);
      if (!held.keys.includes(key)) held.keys.push(key);
    }
    const sorted = [...found].sort(([a], [b]) => zoo.order(a, b));
    const column = work => sorted.map(([, held]) => work(held));
    return {
      x: sorted.map(([x]) => x),
      y: column(held => held.values.reduce((a, b) => a + b, 0) / held.values.length),
      low: column(held => Math.min(...held.values)),
      high: column(held => Math.max(...held.values)),
      keys: column(held => held.keys),
      counts: column(held => held.values.length),
    };
  }

  // Curves of several runs on the places of the one with most: the mean and the range of those that reach there.
  function curves(many) {
    if (many.length === 1) {
      const [{x, y, key}] = many;
      return {x, y, low: y, high: y, keys: x.map(() => [key]), counts: x.map(() => 1)};
    }
    const {x: places} = many.reduce((most, each) => (each.x.length > most.x.length ? each : most));
    const held = places.map(() => ({values: [], keys: []}));
    for (const {x, y, key} of many) {
      let at = 0;
      places.forEach((place, number) => {
        while (at < x.length - 1 && x[at + 1] <= place) at += 1;
        if (!x.length || place < x[0] || place > x[x.length - 1]) return;
        const next = Math.min(at + 1, x.length - 1),
          span = x[next] - x[at];
        const value = span ? y[at] + ((y[next] - y[at]) * (place - x[at])) / span : y[at];
        held[number].values.push(value);
        held[number].keys.push(key);
      });
    }
    const kept = places.map((place, number) => [place, held[number]]).filter(([, {values}]) => values.length);
    const column = work => kept.map(([, each]) => work(each));
    return {
      x: kept.map(([place]) => place),
      y: column(({values}) => values.reduce((a, b) => a + b, 0) / values.length),
      low: column(({values}) => Math.min(...values)),
      high: column(({values}) => Math.max(...values)),
      keys: column(({keys}) => keys),
      counts: column(({values}) => values.length),
    };
  }

  // Round values for a logarithmic axis, at most seven.
  function ticks(values, binary) {
    const log = binary ? Math.log2 : Math.log10,
      base = binary ? 2 : 10;
    const first = Math.floor(log(Math.min(...values))),
      last = Math.ceil(log(Math.max(...values)));
    if (!binary && 2 * (last - first) + 1 <= 7) {
      return Array.from({length: last - first + 1}, (_, i) => [base ** (first + i), 3 * base ** (first + i)]).flat();
    }
    const step = Math.max(1, Math.ceil((last - first) / 6)),
      found = [];
    for (let at = first - (((first % step) + step) % step); at <= last; at += step) found.push(base ** at);
    return found;
  }

  // A logarithmic axis that holds all values and has words at its ticks.
  function logAxis(title, values, words, {binary = false, room = 0.08, above = 0} = {}) {
    const low = Math.log10(Math.min(...values)),
      high = Math.log10(Math.max(...values));
    const pad = Math.max((high - low) * room, 0.06),
      top = high + pad + above * (high - low + 2 * pad) * 0.06;
    const shown = ticks(values, binary).filter(at => Math.log10(at) >= low - pad && Math.log10(at) <= high + pad);
    return {
      title,
      type: 'log',
      tickvals: shown,
      ticktext: shown.map(at => zoo.words.whole(words(at))),
      range: [low - pad, top],
      top,
      step: (high - low + 2 * pad) * 0.06,
    };
  }

  const lengths = values => {
    const shown = [...new Set(values)].sort((a, b) => a - b);
    return {
      title: 'length in tokens',
      type: 'log',
      tickvals: shown,
      ticktext: shown.map(zoo.words.count),
      tickangle: shown.length > 8 ? -40 : 0,
      range: [Math.log10(shown[0]) - 0.06, Math.log10(shown[shown.length - 1]) + 0.06],
    };
  };

  const share = title => ({
    title,
    tickangle: 0,
    range: [-0.03, 1.05],
    tickvals: [0, 0.25, 0.5, 0.75, 1],
    ticktext: ['0 %', '25 %', '50 %', '75 %', '100 %'],
  });

  return {means, curves, logAxis, lengths, share};
})();
