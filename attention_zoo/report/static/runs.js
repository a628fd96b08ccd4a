// Runs and what they say. A run's words stand in the table of fields; its figures in `n`.
zoo.load = data => {
  zoo.data = data;
  zoo.place = new Map(data.fields.map(([name], place) => [name, place]));
  zoo.runs = data.runs.map((run, index) => ({...run, index}));
  zoo.byKey = new Map(zoo.runs.map(run => [run.key, run]));
  for (const run of zoo.runs) Object.assign(run, searched(run));
  zoo.varying = data.fields.map(([name]) => name).filter(name => zoo.distinct(name) > 1);

  // A list stands as JSON, in a mechanism's name, too; quotes and backslashes of its words are looked for as they are.
  function unescaped(said) {
    if (!/(^|=)[[{].*\\/s.test(said)) return said;
    return said.replace(/"(?:[^"\\]|\\.)*"/g, word => {
      try {
        return `"${JSON.parse(word)}"`;
      } catch {
        return word;
      }
    });
  }

  // A word is looked for in what a run says, and one such as seed=3 in what it says under a name, too.
  function searched(run) {
    const places = [...run.f.keys()].filter(place => run.f[place] >= 0);
    const said = places.map(place => unescaped(data.fields[place][1][run.f[place]]));
    const named = places.map((place, index) => `${data.fields[place][0]}=${said[index]}`);
    const joined = parts => parts.join('\n').toLowerCase();
    return {text: joined([run.key, run.why, run.error, run.against, ...said]), named: joined(named)};
  }
};

// What a run says under a name, or null.
zoo.ask = (run, name) => {
  const place = zoo.place.get(name);
  const value = place === undefined ? undefined : run.f[place];
  return value === undefined || value < 0 ? null : zoo.data.fields[place][1][value];
};

zoo.distinct = name => {
  const found = new Set(zoo.runs.map(run => zoo.ask(run, name)));
  return found.size;
};

// "9" before "10", and words by the alphabet.
zoo.order = (a, b) => {
  if (a === b) return 0;
  if (a === null) return 1;
  if (b === null) return -1;
  const numbers = [Number(a), Number(b)];
  if (a !== '' && b !== '' && !numbers.some(Number.isNaN)) return numbers[0] - numbers[1];
  return String(a).localeCompare(String(b), 'en', {numeric: true});
};

zoo.title = run => {
  const words = [run.label];
  for (const [name, said] of [
    ['task', ''],
    ['seed', 'seed '],
    ['length', ''],
  ]) {
    const value = zoo.ask(run, name);
    if (value !== null && !(name === 'length' && zoo.ask(run, 'task'))) {
      words.push(name === 'length' ? `${zoo.words.count(value)} tokens` : `${said}${value}`);
    }
  }
  return `${words.join(', ')}${run.against ? ` against ${run.against}` : ''}`;
};
