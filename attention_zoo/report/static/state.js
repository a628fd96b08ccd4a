// The state of the view, in the address: what one sees can be shared, and goes back with the browser's button.
zoo.state = (() => {
  const plain = {
    q: '',
    by: 'label',
    sort: '',
    run: '',
    setting: '',
    task: '',
    learning: '',
    grouping: '',
    set: '',
    context: '',
    theme: '',
    rows: '',
    attend: '',
    seen: '',
    look: '',
    layer: '',
  };
  const many = ['off', 'cols', 'pin', 'vs', 'facets'];
  const listeners = [];
  let now = read();

  function blank() {
    return {...plain, where: {}, ...Object.fromEntries(many.map(name => [name, []]))};
  }

  function read() {
    const found = blank();
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      if (name.startsWith('f.')) (found.where[name.slice(2)] ??= []).push(value);
      else if (name in plain) found[name] = value;
      else if (many.includes(name)) found[name].push(value);
    }
    return found;
  }

  function written(state) {
    const said = new URLSearchParams();
    for (const [field, values] of Object.entries(state.where))
      for (const value of values) said.append(`f.${field}`, value);
    for (const name of Object.keys(plain)) if (state[name] !== plain[name]) said.append(name, state[name]);
    for (const name of many) for (const value of state[name]) said.append(name, value);
    return said.toString();
  }

  const tell = changed => listeners.forEach(listener => listener(changed));

  function change(patch) {
    now = {...now, ...patch};
    for (const [field, values] of Object.entries(now.where)) if (!values.length) delete now.where[field];
    const said = written(now);
    history.replaceState(null, '', said ? `#${said}` : location.pathname + location.search);
    tell(new Set(Object.keys(patch)));
  }

  addEventListener('hashchange', () => {
    if (/^#[\w-]*$/.test(location.hash)) return; // a heading's anchor
    now = read();
    tell(new Set([...Object.keys(plain), ...many, 'where']));
  });

  return {get: () => now, change, listen: listener => listeners.push(listener), blank, written};
})();
