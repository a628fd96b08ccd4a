// The frame of a chart: title, note, plot, its numbers as a table, CSV and PNG. Drawn when in sight.
//
// A chart's `build()` returns null where there is nothing to draw, or {note, x, y, series, shapes, choices}.
// A series is {group, name, style, x, y, low, high, keys, said, mode, band, marker, dash}: `keys[i]` are the runs
// behind point i, and from `low` to `high` goes a bar, or with `band` an area.
zoo.charts = (() => {
  const charts = [];
  const font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";
  const faded = (hex, share) =>
    hex +
    Math.round(255 * share)
      .toString(16)
      .padStart(2, '0');
  let observer,
    frame = 0;

  function add({key, title, build, height = 340, wide = false}) {
    charts.push({key, title, build, height, wide, spec: null, seen: false, drawn: false, stale: true, waits: false});
  }

  // Of a series among plotly's nodes.
  const name = (chart, number) => `${chart.key}-${number}`;

  function axis(given, {grid, muted}) {
    const {title, log, ...rest} = given;
    return {
      gridcolor: grid,
      linecolor: grid,
      tickcolor: grid,
      zeroline: false,
      automargin: true,
      title: {text: zoo.plain(title), font: {size: 12, color: muted}, standoff: 8},
      ...(log ? {type: 'log'} : {}),
      ...rest,
    };
  }

  function layout(chart) {
    const {spec} = chart,
      colors = zoo.theme.ink(),
      coarse = matchMedia('(pointer: coarse)').matches;
    return {
      font: {family: font, size: 12, color: colors.ink},
      paper_bgcolor: colors.paper,
      plot_bgcolor: colors.paper,
      margin: {l: 8, r: 12, t: 8, b: 8},
      showlegend: false,
      hovermode: 'closest',
      dragmode: coarse ? false : 'zoom',
      hoverlabel: {
        bgcolor: colors.paper,
        bordercolor: colors.grid,
        font: {color: colors.ink, family: font, size: 12},
      },
      xaxis: axis(spec.x, colors),
      yaxis: axis(spec.y, colors),
      height: chart.height,
      shapes: (spec.shapes ?? []).map(shape => ({
        type: 'line',
        line: {color: colors.muted, width: 1, dash: 'dot'},
        ...shape,
      })),
    };
  }

  function traces(chart) {
    if (chart.spec.heat) return heat(chart);
    return chart.spec.series.flatMap((series, number) => {
      const color = zoo.theme.color(series.style),
        [, , marker, dash] = series.style ?? [];
      const line = {color, width: series.width ?? 2, dash: series.dash ?? dash ?? 'solid', shape: series.shape};
      const uid = name(chart, number);
      const main = {
        type: 'scatter',
        uid,
        x: series.x,
        y: series.y,
        mode: series.mode ?? 'lines+markers',
        line,
        marker: {color, symbol: series.marker ?? marker, size: series.size ?? 8, line: {width: 1.5, color}},
        name: zoo.plain(series.name),
        hoverinfo: series.said ? 'text' : 'skip',
        cliponaxis: false,
        hovertext: series.said?.map(text => text.split('\n').map(zoo.plain).join('<br>')),
        ...(series.text ? {text: series.text.map(zoo.plain), textposition: 'top center', textfont: {size: 10}} : {}),
      };
      if (!series.low) return [main];
      if (!series.band) {
        main.error_y = {
          type: 'data',
          symmetric: false,
          thickness: 1,
          width: 3,
          color,
          array: series.high.map((value, i) => value - series.y[i]),
          arrayminus: series.low.map((value, i) => series.y[i] - value),
        };
        return [main];
      }
      const edge = {
        type: 'scatter',
        x: series.x,
        mode: 'lines',
        line: {width: 0},
        hoverinfo: 'skip',
        cliponaxis: true,
      };
      return [
        {...edge, uid: `${uid}-low`, y: series.low},
        {...edge, uid: `${uid}-high`, y: series.high, fill: 'tonexty', fillcolor: faded(color, 0.16)},
        main,
      ];
    });
  }

  function heat(chart) {
    const {heat: map} = chart.spec,
      colors = zoo.theme.ink();
    const scale = zoo.theme.dark()
      ? [
          [0, '#20252c'],
          [0.5, '#2f6f8f'],
          [1, '#c9f0e2'],
        ]
      : [
          [0, '#f3f4f6'],
          [0.5, '#7fb2dd'],
          [1, '#123f82'],
        ];
    return [
      {
        type: 'heatmap',
        x: map.x.map(String),
        y: map.y.map(zoo.plain),
        z: map.z,
        zmin: map.min,
        zmax: map.max,
        colorscale: map.lower ? scale.map(([at], i) => [at, scale[2 - i][1]]) : scale,
        xgap: 1,
        ygap: 1,
        hoverinfo: 'text',
        hovertext: map.said.map(line => line.map(text => zoo.plain(text).replace(/\n/g, '<br>'))),
        hoverongaps: false,
        colorbar: {
          thickness: 10,
          outlinewidth: 0,
          tickfont: {size: 11, color: colors.muted},
          ...(map.share ? {tickformat: '.0%'} : {}),
        },
      },
    ];
  }

  function card(chart) {
    const numbers = zoo.el('div');
    chart.heading = zoo.el('h3', {}, chart.title);
    chart.note = zoo.el('p', {class: 'note'});
    chart.choices = zoo.el('div', {class: 'choices'});
    chart.plot = zoo.el('div', {
      class: 'plot',
      role: 'img',
      'aria-label': chart.title,
      data: {figure: chart.key},
      style: {height: `${chart.height}px`},
    });
    chart.details = zoo.el(
      'details',
      {
        ontoggle: () => {
          if (chart.details.open && chart.spec) fill();
        },
      },
      zoo.el('summary', {}, 'Numbers'),
      numbers,
    );
    const fill = () => numbers.replaceChildren(zoo.table(...zoo.points(chart.spec, true)));
    chart.refill = () => {
      if (chart.details.open && chart.spec) fill();
    };
    chart.card = zoo.el(
      'figure',
      {class: chart.wide ? 'card wide' : 'card', data: {chart: chart.key}, hidden: true},
      zoo.el(
        'figcaption',
        {},
        zoo.el(
          'div',
          {class: 'caption'},
          chart.heading,
          zoo.el(
            'span',
            {class: 'tools'},
            zoo.button(
              'CSV',
              () =>
                zoo.saveCsv(
                  chart.key,
                  zoo.points(chart.spec).flatMap((part, i) => (i ? part : [part])),
                ),
              {
                'aria-label': `Download the points of “${chart.title}” as CSV`,
              },
            ),
            zoo.button('PNG', () => png(chart), {'aria-label': `Download “${chart.title}” as PNG`}),
          ),
        ),
        chart.choices,
        chart.note,
      ),
      chart.plot,
      chart.details,
    );
    return chart.card;
  }

  async function png(chart) {
    const {width} = chart.plot.getBoundingClientRect();
    const image = await Plotly.toImage(
      {
        data: traces(chart),
        layout: {
          ...layout(chart),
          title: {text: zoo.plain(chart.spec.title ?? chart.title), font: {size: 15}},
          margin: {l: 8, r: 12, t: 40, b: 8},
        },
      },
      {format: 'png', width: Math.max(640, Math.round(width)), height: chart.height + 40, scale: 2},
    );
    const bytes = Uint8Array.from(atob(image.split(',')[1]), letter => letter.charCodeAt(0));
    zoo.save(`${chart.key}.png`, new Blob([bytes], {type: 'image/png'}));
  }

  // Work out again what each chart shows, one in a frame, those in sight first: whoever types is never kept waiting.
  function renew() {
    for (const chart of charts) chart.stale = true;
    delete document.body.dataset.drawn;
    pump();
  }

  function pump() {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => {
      const next =
        charts.find(chart => chart.seen && (chart.stale || chart.waits)) ?? charts.find(chart => chart.stale);
      if (!next) {
        document.body.dataset.drawn = charts.filter(chart => chart.drawn && chart.spec).length;
        return;
      }
      if (next.stale) prepare(next);
      if (next.seen && next.spec) draw(next);
      pump();
    });
  }

  function prepare(chart) {
    chart.spec = chart.build();
    chart.stale = false;
    chart.waits = Boolean(chart.spec);
    chart.card.hidden = !chart.spec;
    if (!chart.spec) return;
    chart.heading.textContent = chart.spec.title ?? chart.title;
    chart.note.textContent = chart.spec.note ?? '';
    chart.choices.replaceChildren(...(chart.spec.choices ?? []));
    chart.height = chart.spec.height ?? chart.height;
    chart.plot.style.height = `${chart.height}px`;
    chart.refill();
  }

  function draw(chart) {
    chart.waits = false;
    Plotly.react(chart.plot, traces(chart), layout(chart), {responsive: true, displayModeBar: false});
    if (!chart.drawn) {
      chart.drawn = true;
      chart.plot.dataset.drawn = 'yes';
      chart.plot.on('plotly_hover', event => zoo.link.point(at(chart, event.points[0])));
      chart.plot.on('plotly_unhover', () => zoo.link.point(null));
      chart.plot.on('plotly_click', event => {
        const found = at(chart, event.points[0]);
        if (found?.keys.length) zoo.link.choose(found.keys[0]);
      });
      chart.plot.on('plotly_afterplot', () => {
        scale(chart.plot);
        mark(chart, zoo.link.now());
      });
    }
    scale(chart.plot);
    mark(chart, zoo.link.now());
  }

  // What stands behind a point of plotly's.
  function at(chart, point) {
    const {spec} = chart;
    if (spec.heat) {
      const [line, column] = [].concat(point.pointIndex ?? point.pointNumber);
      return {group: spec.heat.groups[line], keys: spec.heat.keys[line][column] ?? []};
    }
    const uid = point.data.uid;
    const series = spec.series.find((each, number) => name(chart, number) === uid);
    return series && series.group !== undefined
      ? {group: series.group, keys: series.keys?.[point.pointIndex ?? point.pointNumber] ?? []}
      : null;
  }

  // What is not pointed at steps back: by the nodes themselves, since to draw again takes too long.
  function mark(chart, what) {
    if (!chart.drawn || !chart.spec) return;
    if (chart.spec.heat) {
      const lines = chart.spec.heat.groups
        .map((group, line) => (group === what?.group ? line : -1))
        .filter(line => line >= 0);
      chart.card.dataset.linked = lines.map(line => chart.spec.heat.y[line]).join('\n');
      const ticks = chart.plot.querySelectorAll('.ytick text');
      ticks.forEach((tick, line) => tick.classList.toggle('linked', chart.spec.heat.groups[line] === what?.group));
      return;
    }
    const there = Boolean(what) && chart.spec.series.some(series => series.group === what.group);
    chart.card.dataset.linked = there ? what.group : '';
    chart.spec.series.forEach((series, number) => {
      const uid = name(chart, number);
      const mine =
        !there ||
        series.group === undefined ||
        (series.group === what.group && !(series.alone && what.keys.length && !what.keys.includes(series.alone)));
      for (const end of ['', '-low', '-high']) {
        for (const node of chart.plot.querySelectorAll(`.trace${CSS.escape(uid + end)}`)) {
          node.classList.toggle('faint', !mine);
        }
      }
    });
  }

  // Paper is narrower than the screen that a chart was drawn for.
  function scale(plot) {
    const {width, height} = plot._fullLayout;
    plot.style.setProperty('--ratio', `${width} / ${height}`);
    for (const svg of plot.querySelectorAll('.main-svg')) svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  }

  function start(node) {
    node.append(...charts.map(card));
    observer = new IntersectionObserver(
      entries => {
        for (const entry of entries) {
          const chart = charts.find(each => each.plot === entry.target);
          chart.seen = entry.isIntersecting;
        }
        pump();
      },
      {rootMargin: '250px'},
    );
    charts.forEach(chart => observer.observe(chart.plot));
    zoo.link.listen(what => charts.forEach(chart => mark(chart, what)));
    addEventListener('beforeprint', () => {
      for (const chart of charts) {
        if (chart.stale) prepare(chart);
        if (chart.spec) draw(chart);
      }
    });
    renew();
  }

  return {add, start, renew, charts, layout};
})();
