// The points of a chart as a table, its headers and its lines: in words for readers, in numbers for a file.
zoo.points = (spec, words = false) => {
  if (spec.heat) {
    const {x, y, z, say} = spec.heat;
    return [
      ['', ...x],
      y.map((name, line) => [
        name,
        ...z[line].map(value => (value === null ? (words ? zoo.words.none : null) : words ? say(value) : value)),
      ]),
    ];
  }
  const say = value => (typeof value === 'number' ? (spec.say ?? zoo.words.fixed)(value) : String(value));
  const range = spec.series.some(series => series.low);
  const many = spec.series.flatMap(series =>
    series.x.map((x, i) => {
      const figures = [series.y[i], ...(range ? [series.low?.[i] ?? null, series.high?.[i] ?? null] : [])];
      const at = words && typeof x === 'number' ? (spec.sayX ?? zoo.words.count)(x) : x;
      const told = series.lost
        ? [series.lost, ...figures.slice(1).map(() => '')]
        : words
          ? figures.map(value => (value === null ? zoo.words.none : say(value)))
          : figures;
      return [
        series.name,
        at,
        ...told,
        words ? (series.said?.[i] ?? '').split('\n').slice(2).join('; ') : (series.keys?.[i] ?? []).join(' '),
      ];
    }),
  );
  const most = words ? 400 : Infinity;
  return [
    ['', spec.x.title, spec.y.title, ...(range ? ['from', 'to'] : []), words ? '' : 'runs'],
    many.slice(0, most),
  ];
};
