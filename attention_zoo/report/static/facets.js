// The bar above everything: search, a filter for each field asked for, how runs are grouped.
zoo.facets = (() => {
  const usual = ['mechanism', 'task', 'length', 'device', 'seed', 'status', 'kind', 'sweep'];
  const most = 400; // values of one field that are listed
  let bar, said;

  const words = field => field.replace(/_/g, ' ');

  function fields() {
    const {facets, where} = zoo.state.get();
    const asked = [...usual.filter(name => zoo.varying.includes(name)), ...facets, ...Object.keys(where)];
    return [...new Set(asked)].filter(name => zoo.place.has(name));
  }

  function toggle(field, value) {
    const {where} = zoo.state.get();
    const mine = where[field] ?? [];
    const next = mine.includes(value) ? mine.filter(each => each !== value) : [...mine, value];
    zoo.state.change({where: {...where, [field]: next}});
  }

  function options(field) {
    const mine = zoo.state.get().where[field] ?? [];
    const counts = zoo.select.counts(field);
    const line = ([value, count]) =>
      zoo.el(
        'label',
        {class: count ? 'option' : 'option none'},
        zoo.el('input', {
          type: 'checkbox',
          checked: mine.includes(value),
          data: {field, value},
          onchange: () => toggle(field, value),
        }),
        zoo.el('span', {}, value === '' ? '(none)' : value),
        zoo.el('small', {}, count),
      );
    const lines = counts.slice(0, most).map(line);
    if (counts.length > most)
      lines.push(zoo.el('p', {class: 'note'}, `${counts.length - most} more: search for them`));
    return lines;
  }

  function facet(field) {
    const box = zoo.el('div', {class: 'options', role: 'group', 'aria-label': words(field)});
    const summary = zoo.el('summary', {});
    const details = zoo.el(
      'details',
      {
        class: 'facet',
        data: {field},
        ontoggle: () => {
          if (details.open) box.replaceChildren(...options(field));
        },
      },
      summary,
      box,
    );
    details.refresh = () => {
      const mine = zoo.state.get().where[field] ?? [];
      const one = mine.length === 1 ? `: ${mine[0] || '(none)'}` : mine.length ? `: ${mine.length}` : '';
      summary.textContent = `${words(field)}${one}`;
      details.classList.toggle('set', mine.length > 0);
      if (!details.open) return;
      const at = document.activeElement?.dataset?.value;
      const held = box.contains(document.activeElement);
      box.replaceChildren(...options(field));
      if (held) [...box.querySelectorAll('input')].find(input => input.dataset.value === at)?.focus();
    };
    return details;
  }

  function groupings() {
    const names = ['label', 'mechanism', ...zoo.varying.filter(name => !['label', 'mechanism'].includes(name))];
    return names.map(name => [name, name === 'label' ? 'mechanism and what differs' : words(name)]);
  }

  function draw() {
    const shown = fields(),
      held = bar.contains(document.activeElement) ? document.activeElement : null;
    const open = [...bar.querySelectorAll('.facet[open]')].map(details => details.dataset.field);
    const more = zoo.data.fields
      .map(([name]) => name)
      .filter(name => !shown.includes(name) && zoo.varying.includes(name));
    bar.replaceChildren(
      zoo.el(
        'label',
        {class: 'search'},
        zoo.el('span', {class: 'quiet'}, 'Search runs'),
        zoo.el('input', {
          type: 'search',
          id: 'search',
          placeholder: 'Search runs (press /)',
          value: zoo.state.get().q,
          oninput: event => zoo.state.change({q: event.target.value}),
        }),
      ),
      ...shown.map(facet),
      more.length
        ? zoo.choice(
            'Filter by',
            [['', 'more …'], ...more.map(name => [name, name])],
            '',
            field => {
              zoo.state.change({facets: [...zoo.state.get().facets, field]});
              bar.querySelector(`.facet[data-field="${CSS.escape(field)}"]`).open = true;
            },
            {id: 'more'},
          )
        : '',
      zoo.choice('Group by', groupings(), zoo.state.get().by, by => zoo.state.change({by, off: []}), {id: 'by'}),
      zoo.button('Reset', () => zoo.state.change({...zoo.state.blank(), theme: zoo.state.get().theme}), {
        id: 'reset',
      }),
      said,
    );
    bar.dataset.fields = shown.join('\n');
    // whoever was typing or choosing goes on, though new runs came in
    for (const details of bar.querySelectorAll('.facet')) details.open = open.includes(details.dataset.field);
    if (held?.id) {
      const again = zoo.by(held.id);
      again?.focus();
      if (held.id === 'search') again.setSelectionRange(held.selectionStart, held.selectionEnd);
    }
    refresh();
  }

  function refresh() {
    for (const details of bar.querySelectorAll('.facet')) details.refresh();
    const count = zoo.select.shown().length;
    said.textContent = `${count} of ${zoo.runs.length} runs`;
  }

  function start(node) {
    bar = node;
    said = zoo.el('output', {id: 'count', 'aria-live': 'polite'});
    draw();
    zoo.state.listen(changed => {
      const search = zoo.by('search');
      if (search.value !== zoo.state.get().q) search.value = zoo.state.get().q;
      if (changed.has('facets') || changed.has('by') || bar.dataset.fields !== fields().join('\n')) draw();
      else refresh();
    });
    document.addEventListener('click', event => {
      for (const open of bar.querySelectorAll('.facet[open]')) if (!open.contains(event.target)) open.open = false;
    });
    bar.addEventListener('keydown', event => {
      const open = event.target.closest('.facet[open]');
      if (event.key === 'Escape' && open) {
        open.open = false;
        open.querySelector('summary').focus();
        event.stopPropagation();
      }
    });
  }

  return {start, draw, toggle};
})();
