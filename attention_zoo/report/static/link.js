// What is pointed at or chosen in one place shows in all: tables, charts, pictures, legend.
zoo.link = (() => {
  const listeners = [];
  let pointed = null,
    frame = 0;

  // A pointed place: {group, keys}, or null for none.
  function point(what) {
    if (pointed?.group === what?.group && String(pointed?.keys) === String(what?.keys)) return;
    pointed = what;
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => listeners.forEach(listener => listener(now())));
  }

  function choose(key) {
    zoo.state.change({run: zoo.state.get().run === key ? '' : key});
  }

  // What is to stand out: what is pointed at, or else what was chosen.
  function now() {
    if (pointed) return pointed;
    const run = zoo.byKey.get(zoo.state.get().run);
    return run ? {group: zoo.select.groupOf(run), keys: [run.key]} : null;
  }

  const listen = listener => {
    listeners.push(listener);
  };
  const again = () => listeners.forEach(listener => listener(now()));
  return {point, choose, now, listen, again};
})();
