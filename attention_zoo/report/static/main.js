// Puts everything in its place.
(() => {
  const read = id => JSON.parse(zoo.by(id).textContent);
  const {palette, first, live} = read('settings');
  zoo.palette = palette;
  zoo.first = first;
  zoo.load(read('runs'));
  zoo.columns.load();

  // Of what a change of the state concerns.
  const quiet = ['run', 'sort', 'cols', 'pin', 'vs', 'rows', 'theme'];
  zoo.state.listen(() => zoo.select.renew()); // before all other listeners
  zoo.redraw = () => {
    zoo.select.renew();
    zoo.facets.draw();
    zoo.runsTable.again();
    zoo.legend.draw();
    zoo.charts.renew();
    zoo.pictures.again();
    zoo.heads.again();
    zoo.details.render();
  };

  zoo.theme.start(() => {
    zoo.legend.draw();
    zoo.runsTable.draw();
    zoo.charts.renew();
    zoo.pictures.draw();
    zoo.heads.draw();
  });
  zoo.facets.start(zoo.by('facets'));
  zoo.legend.start(zoo.by('legend'));
  zoo.runsTable.start(zoo.by('table-tools'), zoo.by('table'));
  zoo.charts.start(zoo.by('charts'));
  zoo.pictures.start(zoo.by('pictures'));
  zoo.heads.start(zoo.by('heads'));
  zoo.details.start(zoo.by('details'));
  zoo.diff.start(zoo.by('diff'));
  let frame = 0,
    asked = false;
  zoo.state.listen(changed => {
    const loud = [...changed].some(name => !quiet.includes(name));
    if (!loud && !changed.has('run')) return;
    asked ||= loud;
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => {
      // the table has answered already; what is large follows
      if (asked) {
        zoo.legend.draw();
        zoo.pictures.draw();
        zoo.heads.draw();
      }
      asked = false;
      zoo.charts.renew();
    });
  });
  addEventListener('keydown', event => {
    if (event.key !== '/' || event.target.matches('input, textarea, select')) return;
    zoo.by('search').focus();
    event.preventDefault();
  });
  if (live) zoo.live.start();
  if (/=/.test(location.hash)) zoo.by('runs-section').scrollIntoView(); // a view that somebody shared
})();
