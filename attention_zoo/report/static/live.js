// Of a page that is served: asks whether there is more, and shows it where the reader stands.
zoo.live = (() => {
  const every = 2000;
  let version = null;

  async function ask() {
    const said = zoo.by('live');
    try {
      const answer = await fetch('data.json', {
        headers: version ? {'If-None-Match': version} : {},
        cache: 'no-store',
      });
      if (answer.status === 200) {
        const next = answer.headers.get('ETag');
        const {data, sections} = await answer.json();
        if (version !== null) show(data, sections);
        version = next;
      }
      said.textContent = `live, ${new Date().toLocaleTimeString()}`;
    } catch {
      said.textContent = 'the server does not answer';
    }
    setTimeout(ask, every);
  }

  function show(data, sections) {
    zoo.load(data);
    zoo.columns.load();
    for (const [key, html] of Object.entries(sections)) {
      // of our own server, escaped as the page itself
      const section = zoo.by(key === 'lead' ? key : `${key}-content`);
      if (section && section.innerHTML !== html) section.innerHTML = html;
    }
    zoo.redraw();
  }

  return {start: ask};
})();
