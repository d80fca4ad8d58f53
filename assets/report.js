// Draws the charts of report.html and works its buttons. Every text, figure and table is already in the page: without
// this script it still reads. Whatever comes from outside is inserted as text, never as markup.
(function () {
  'use strict';
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById('data').textContent);
  const places = Array.from(document.querySelectorAll('.chart'));
  const drawn = new Map();
  const PERCENTILES = ['p50', 'p95', 'p99'];
  const FONT = getComputedStyle(document.body).fontFamily.replace(/"/g, "'");  // goes into attributes too
  let hovered = null;

  root.classList.add('js');
  root.dataset.charts = '0';
  function failed(text) { root.dataset.failure = (root.dataset.failure || '') + text + '; '; }
  window.addEventListener('error', function (event) { failed(event.message); });

  // Language, theme, numbers

  function language() { return root.classList.contains('zh') ? 1 : 0; }
  function say(text) { return Array.isArray(text) ? text[language()] : text == null ? '' : String(text); }
  function word(key) { return say(data.words[key]); }
  function isDark() {
    return root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  }
  function colour(name) { return getComputedStyle(root).getPropertyValue('--' + name).trim(); }
  function faded(name, share) {
    const hex = colour(name);
    return hex + Math.round(share * 255).toString(16).padStart(2, '0');
  }
  function escaped(text) {
    return String(text).replace(/[&<>"']/g, function (sign) { return '&#' + sign.charCodeAt(0) + ';'; });
  }
  function grouped(value, places) {
    return Number(value).toLocaleString('en-US', {minimumFractionDigits: places, maximumFractionDigits: places});
  }
  function figure(value) {  // three significant digits, as the page has them
    if (value == null) return '–';
    const size = Math.abs(Number(value.toPrecision(3)));
    return grouped(value, size ? Math.max(0, Math.min(3, 2 - Math.floor(Math.log10(size)))) : 0);
  }
  function tick(value) { return Number(value.toPrecision(10)).toLocaleString('en-US', {maximumFractionDigits: 10}); }
  function minutes(seconds) {  // m:ss, from an hour on h:mm:ss
    const whole = Math.round(seconds), two = function (number) { return String(number).padStart(2, '0'); };
    const rest = two(whole % 60), all = Math.floor(whole / 60);
    return all < 60 ? all + ':' + rest : Math.floor(all / 60) + ':' + two(all % 60) + ':' + rest;
  }
  function width(text) {
    return Array.from(text).reduce(function (sum, sign) { return sum + (sign > '\u2e80' ? 12 : 7); }, 0);
  }

  // Axes: ticks at 1-2-5; a logarithmic axis is a linear one over log10, so that its ticks are ours

  function roundStep(span, most) {
    const power = Math.pow(10, Math.floor(Math.log10(span / most)));
    return [1, 2, 5, 10].map(function (step) { return step * power; }).find(function (step) {
      return span / step <= most + 1e-9;
    });
  }
  function ticksBetween(low, high, most) {
    const step = roundStep(high - low || 1, most), ticks = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) ticks.push(index * step);
    return ticks;
  }
  function logTicks(low, high, room) {
    const candidates = [[1, 2, 5], [1, 3], [1]].map(function (steps) {
      const ticks = [];
      for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
        steps.forEach(function (step) {
          const place = power + Math.log10(step);
          if (place >= low - 1e-9 && place <= high + 1e-9) ticks.push(place);
        });
      }
      return ticks;
    });
    return candidates.find(function (ticks) { return ticks.length * 48 <= room; }) || candidates[2];
  }
  function textStyle(name) { return {color: colour(name || 'ink3'), fontFamily: FONT, fontSize: 12}; }
  function yAxis(highest, unit, left, whole) {
    const top = highest > 0 ? highest : 1;
    let step = roundStep(top, 5);
    if (whole && step < 1) step = 1;
    const max = Math.ceil(top / step - 1e-9) * step;
    return {type: 'value', min: 0, max: max, interval: step, axisLine: {show: false, onZero: false}, axisTick: {show: false},
      splitLine: {show: true, lineStyle: {color: colour('rule'), width: 1}},
      axisLabel: Object.assign({formatter: tick, margin: 8}, textStyle()),
      name: unit, nameLocation: 'end', nameGap: 9,
      nameTextStyle: Object.assign({align: 'left', padding: [0, 0, 0, 8 - left]}, textStyle())};
  }
  function leftOf(highest) {
    const step = roundStep(highest || 1, 5), top = Math.ceil((highest || 1) / step) * step;
    return Math.max(28, 7 * Math.max(tick(top).length, tick(step).length) + 14);
  }
  function xAxis(low, high, ticks, label, title) {
    return {type: 'value', min: low, max: high, axisLine: {show: true, onZero: false, lineStyle: {color: colour('rule2')}},
      axisTick: {show: true, customValues: ticks, length: 4, lineStyle: {color: colour('rule2')}}, splitLine: {show: false},
      axisLabel: Object.assign({customValues: ticks, formatter: label, hideOverlap: true, margin: 8}, textStyle()),
      name: title, nameLocation: 'middle', nameGap: 26, nameTextStyle: textStyle()};
  }
  function timeScale(spec, low, high, look) {  // the x axis of times: its place of a value, and the axis itself
    const place = spec.log ? function (value) { return Math.log10(value / spec.divisor); }
      : function (value) { return value / spec.divisor; };
    const from = place(low), to = place(high), room = look.width - 60;
    const ticks = spec.log ? logTicks(from, to, room) : ticksBetween(from, to, Math.max(3, Math.floor(room / 52)));
    const label = spec.log ? function (value) { return tick(Number(Math.pow(10, value).toPrecision(3))); } : tick;
    return {place: place, axis: xAxis(from, to, ticks, label, say(spec.x))};
  }
  function frame(left, right, top, bottom) {
    return {left: left, right: right, top: top, bottom: bottom, outerBoundsMode: 'none', containLabel: false};
  }
  function tooltip(trigger, formatter) {
    return {trigger: trigger, confine: true, backgroundColor: colour('paper'), borderColor: colour('rule2'), borderWidth: 1,
      padding: [6, 9], extraCssText: 'box-shadow:none;border-radius:0', textStyle: textStyle('ink'), transitionDuration: 0,
      axisPointer: {type: 'line', lineStyle: {color: colour('ink3'), width: 1, type: 'solid'}}, formatter: formatter};
  }
  function option(parts) {
    return Object.assign({animation: false, backgroundColor: 'transparent', textStyle: {fontFamily: FONT}}, parts);
  }
  function inLines(text, room) {  // broken after its first comma where it doesn't fit
    return width(text) > room ? text.replace(/[,，、] ?/, '$&\n') : text;
  }
  function lines(texts) { return texts.map(escaped).join('<br>'); }

  // Percentiles as stems that rise above the plot to labels on three rows, P50 lowest

  function stems(spec, place) {
    const marks = spec.marks.map(function (mark) { return {name: mark.name, text: mark.text, x: place(mark.value)}; });
    return {type: 'custom', silent: true, clip: false, z: 5, tooltip: {show: false}, encode: {x: 0, y: 1},
      data: marks.map(function (mark) { return [mark.x, 0]; }).reverse(),  // the lowest label is drawn last, over the stems
      renderItem: function (params, api) {
        const index = marks.length - 1 - params.dataIndex, mark = marks[index], plot = params.coordSys;
        const x = api.coord([mark.x, 0])[0];
        const next = marks[index + 1] ? api.coord([marks[index + 1].x, 0])[0] : Infinity;
        const row = PERCENTILES.indexOf(mark.name), top = plot.y - 12 - 16 * row;
        const room = width(mark.text) + 12;
        const left = x > plot.x + 0.72 * plot.width || (next - x < Math.max(92, room) && x - plot.x > 110);
        return {type: 'group', children: [
          {type: 'line', shape: {x1: x, x2: x, y1: top - 2, y2: plot.y + plot.height},
            style: {stroke: colour(mark.name), lineWidth: mark.name === 'p50' ? 2 : 1.5}},
          {type: 'text', style: {text: mark.text, x: x + (left ? -7 : 7), y: top + 4, align: left ? 'right' : 'left',
            verticalAlign: 'middle', fill: colour('ink'), fontWeight: 600, fontSize: 12, fontFamily: FONT, stroke: colour('paper'), lineWidth: 3}}]};
      }};
  }

  const STEM_ROOM = 62;

  function histogram(spec, look) {
    const edges = spec.edges, counts = spec.counts, highest = Math.max.apply(null, counts), left = leftOf(highest);
    const scale = timeScale(spec, edges[0], edges[edges.length - 1], look);
    const bars = {type: 'custom', encode: {x: [0, 1], y: 2}, clip: true, z: 2,
      data: counts.map(function (count, index) { return [scale.place(edges[index]), scale.place(edges[index + 1]), count]; }),
      renderItem: function (params, api) {
        if (!api.value(2)) return null;
        const from = api.coord([api.value(0), api.value(2)]), to = api.coord([api.value(1), 0]);
        const wide = Math.max(1, to[0] - from[0] - (to[0] - from[0] > 4 ? 1 : 0)), high = Math.max(1.5, to[1] - from[1]);
        return {type: 'group', children: [
          {type: 'rect', shape: {x: from[0], y: to[1] - high, width: wide, height: high}, style: {fill: colour('ok')}},
          {type: 'rect', shape: {x: from[0], y: to[1] - high, width: wide, height: 1.5}, style: {fill: colour('p95')}}]};
      }};
    const y = yAxis(highest, say(spec.y), left, true), first = scale.place(spec.marks[0].value);
    const reach = (first - scale.axis.min) / (scale.axis.max - scale.axis.min) * (look.width - left - 22);
    if (reach < width(say(spec.y)) + 16 - left) y.nameGap += 32;  // the lowest label would run into the unit
    const total = counts.reduce(function (sum, count) { return sum + count; }, 0);
    return option({grid: frame(left, 22, STEM_ROOM, 44), xAxis: scale.axis, yAxis: y,
      series: [bars, stems(spec, scale.place)],
      tooltip: tooltip('item', function (hit) {
        const from = edges[hit.dataIndex] / spec.divisor, to = edges[hit.dataIndex + 1] / spec.divisor;
        return lines([figure(from) + ' – ' + figure(to) + ' ' + spec.unit, grouped(counts[hit.dataIndex], 0) + ' / ' +
          grouped(total, 0)]);
      })});
  }

  function strip(spec, look) {
    const values = spec.values, low = values[0], high = values[values.length - 1], pad = (high - low) * 0.06 || high * 0.1 || 1;
    const scale = timeScale(spec, spec.log ? low * 0.9 : Math.max(0, low - pad), spec.log ? high * 1.1 : high + pad, look);
    return option({grid: frame(16, 16, STEM_ROOM, 44), xAxis: scale.axis,
      yAxis: {type: 'value', min: -1, max: 1, show: false},
      series: [{type: 'scatter', symbolSize: 9, itemStyle: {color: colour('p95'), opacity: 0.7},
        data: values.map(function (value) { return [scale.place(value), 0]; })}, stems(spec, scale.place)],
      tooltip: tooltip('item', function (hit) { return figure(values[hit.dataIndex] / spec.divisor) + ' ' + spec.unit; })});
  }

  function pairs(flat) {
    const found = [];
    for (let index = 0; index < flat.length; index += 2) found.push([flat[index], flat[index + 1]]);
    return found;
  }

  const SHARES = [[0.25, 'solid'], [0.5, 'dashed'], [0.75, 'solid'], [0.95, 'dashed']];

  function curves(spec, look) {
    const series = spec.series.map(function (one) { return Object.assign({}, one, {points: pairs(one.points)}); });
    const all = [].concat.apply([], series.map(function (one) { return one.points.map(function (point) { return point[0]; }); }));
    const low = Math.log10(Math.min.apply(null, all)), high = Math.log10(Math.max.apply(null, all));
    const pad = Math.max(0.03, (high - low) * 0.02);
    let ticks = logTicks(low - pad, high + pad, look.width - 60);
    if (ticks.length < 3) ticks = ticksBetween(Math.pow(10, low - pad), Math.pow(10, high + pad), 5).map(Math.log10);  // a narrow range
    const shareName = function (share) {
      return share === 0.5 ? 'P50' : share === 0.95 ? 'P95' : Math.round(share * 100) + (language() ? '%' : ' %');
    };
    const guides = {type: 'custom', silent: true, z: 1, tooltip: {show: false}, encode: {x: 0, y: 1},
      data: SHARES.map(function (share) { return [low, share[0]]; }),
      renderItem: function (params, api) {
        const y = api.coord([low, SHARES[params.dataIndex][0]])[1], plot = params.coordSys;
        const dashed = SHARES[params.dataIndex][1] === 'dashed';
        return {type: 'line', shape: {x1: plot.x, x2: plot.x + plot.width, y1: y, y2: y},
          style: {stroke: colour(dashed ? 'rule2' : 'rule'), lineWidth: 1, lineDash: dashed ? [4, 3] : null}};
      }};
    const names = {type: 'custom', silent: true, z: 6, clip: false, tooltip: {show: false}, encode: {x: 0, y: 1},
      data: series.map(function (one, index) {
        const share = one.at || (one.dashed ? (index % 2 ? 0.18 : 0.38) : 0.72);  // two that lie on one another keep their names
        const at = one.points.find(function (point) { return point[1] >= share; }) || one.points[one.points.length - 1];
        return [Math.log10(at[0]), at[1], index];
      }),
      renderItem: function (params, api) {
        const at = api.coord([api.value(0), api.value(1)]), one = series[api.value(2)];
        const room = width(say(one.name)) + 12, plot = params.coordSys;
        const after = at[0] - plot.x < room || (one.dashed && plot.x + plot.width - at[0] > room);
        return {type: 'text', style: {text: say(one.name), x: at[0] + (after ? 9 : -9), y: at[1],
          align: after ? 'left' : 'right', verticalAlign: 'middle', fill: colour(one.colour), fontWeight: 600, fontSize: 12, fontFamily: FONT,
          stroke: colour('paper'), lineWidth: 3}};
      }};
    const drawnLines = series.map(function (one) {
      return {type: 'line', showSymbol: false, silent: true, z: 3, lineStyle: {color: colour(one.colour), width: 1.8,
        type: one.dashed ? 'dashed' : 'solid'}, itemStyle: {color: colour(one.colour)},
        data: one.points.map(function (point) { return [Math.log10(point[0]), point[1]]; })};
    });
    const circles = series.map(function (one) {
      return {type: 'scatter', symbol: 'circle', symbolSize: 8, z: 4,
        itemStyle: {color: colour('paper'), borderColor: colour(one.colour), borderWidth: 1.8},
        data: one.marks.map(function (mark, index) { return {value: [Math.log10(mark[0]), mark[1]], name: say(one.name) + ' ' +
          PERCENTILES[index].toUpperCase() + ': ' + figure(mark[0]) + ' ms'}; })};
    });
    const y = {type: 'value', min: 0, max: 1.04, axisLine: {show: false, onZero: false}, axisTick: {show: false}, splitLine: {show: false},
      axisLabel: Object.assign({customValues: [0, 0.25, 0.5, 0.75, 0.95], formatter: shareName, margin: 8}, textStyle())};
    return option({grid: frame(44, 22, 20, 44), yAxis: y, series: [guides].concat(drawnLines, circles, [names]),
      xAxis: xAxis(low - pad, high + pad, ticks, function (value) { return tick(Number(Math.pow(10, value).toPrecision(3))); },
        say(spec.x)), tooltip: tooltip('item', function (hit) { return escaped(hit.name); })});
  }

  function timeOption(spec, look) {
    const span = spec.step * spec.number, unit = say(spec.y), dots = spec.form === 'dots';
    const series = spec.series.map(function (one) {
      return {colour: one.colour, name: one.name, points: dots ? pairs(one.points) : one.values.map(function (value, index) {
        return [(index + 0.5) * spec.step, value];
      })};
    });
    const values = [].concat.apply([], series.map(function (one) { return one.points.map(function (point) { return point[1]; }); }));
    const highest = Math.max.apply(null, values.concat(0)), left = 48;  // one frame for all that share the axis
    const ticks = ticksBetween(0, span, Math.max(3, Math.floor((look.width - left - 40) / 64)));
    const inMinutes = span > 120;
    const minuteTicks = inMinutes ? minuteSteps(span, Math.max(3, Math.floor((look.width - left - 40) / 60))) : ticks;
    const drawnSeries = series.map(function (one) { return timeSeries(spec, one, span); });
    const named = series.some(function (one) { return one.name; });
    return option({grid: frame(left, 40, 24, 24),
      xAxis: xAxis(0, span, minuteTicks, inMinutes ? minutes : function (value) { return tick(value) + ' s'; }, ''),
      yAxis: yAxis(highest, unit, left, spec.form === 'bar'), series: drawnSeries.concat(named ? [endNames(series)] : []),
      tooltip: tooltip(dots ? 'item' : 'axis', function (hits) {
        if (!dots && hovered !== look.name) return '';
        const list = [].concat(hits).filter(function (hit) { return hit.seriesName !== 'names'; });
        const at = list[0].value[0];
        const from = dots ? figure(at) + ' s' : inMinutes ? minutes(at - spec.step / 2) + ' – ' + minutes(at + spec.step / 2)
          : figure(at - spec.step / 2) + ' – ' + figure(at + spec.step / 2) + ' s';
        return lines([from].concat(list.map(function (hit) {
          return (hit.seriesName && hit.seriesName[0] === 'P' ? hit.seriesName + ' ' : '') + figure(hit.value[1]) + ' ' + unit;
        })));
      })});
  }
  function minuteSteps(span, most) {
    const step = [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400].find(function (one) {
      return span / one <= most;
    }) || 86400, ticks = [];
    for (let at = 0; at <= span; at += step) ticks.push(at);
    return ticks;
  }
  function timeSeries(spec, one, span) {
    const base = {name: one.name || '', data: one.points, z: 3};
    const line = {color: colour(one.colour), width: 1.8};
    if (spec.form === 'dots') {
      return Object.assign(base, {type: 'scatter', symbolSize: 5, itemStyle: {color: colour('p95'), opacity: 0.6}});
    }
    if (spec.form === 'bar') {
      const gap = spec.step * 0.08;
      return Object.assign(base, {type: 'custom', encode: {x: 0, y: 1}, renderItem: function (params, api) {
        if (!api.value(1)) return null;
        const from = api.coord([api.value(0) - spec.step / 2 + gap, api.value(1)]);
        const to = api.coord([api.value(0) + spec.step / 2 - gap, 0]);
        return {type: 'rect', style: {fill: colour(one.colour)},
          shape: {x: from[0], y: from[1], width: Math.max(2, to[0] - from[0]), height: to[1] - from[1]}};
      }});
    }
    const lone = one.points.length < 2;
    return Object.assign(base, {type: 'line', showSymbol: lone, symbolSize: 6, symbol: 'circle', connectNulls: false,
      lineStyle: line, itemStyle: {color: colour(one.colour)},
      areaStyle: spec.form === 'area' ? {color: faded(one.colour, 0.14)} : undefined});
  }
  function lastKnown(points) {
    for (let index = points.length - 1; index >= 0; index--) if (points[index][1] != null) return points[index];
    return null;
  }
  function endNames(series) {  // names at the ends of lines, at least 13 px apart
    const ends = series.map(function (one) { return {one: one, at: lastKnown(one.points)}; })
      .filter(function (end) { return end.at; });
    const rightmost = function (api) {
      return Math.max.apply(null, ends.map(function (end) { return api.coord(end.at)[0]; }));
    };
    return {type: 'custom', name: 'names', silent: true, clip: false, z: 6, tooltip: {show: false}, encode: {x: 0, y: 1},
      data: ends.map(function (end) { return end.at; }),
      renderItem: function (params, api) {
        const spots = ends.map(function (end, index) { return {index: index, y: api.coord(end.at)[1]}; })
          .sort(function (first, second) { return first.y - second.y; });
        for (let index = 1; index < spots.length; index++) {
          spots[index].y = Math.max(spots[index].y, spots[index - 1].y + 13);
        }
        const end = ends[params.dataIndex];
        const spot = spots.find(function (one) { return one.index === params.dataIndex; });
        return {type: 'text', style: {text: say(end.one.name), x: rightmost(api) + 8, y: spot.y, verticalAlign: 'middle',
          fill: colour(end.one.colour), fontWeight: 600, fontSize: 12, fontFamily: FONT}};
      }};
  }

  function phases(spec, look) {
    const groups = spec.values[0].length;
    const sums = spec.values[0].map(function (unused, group) {
      return spec.values.reduce(function (sum, values) { return sum + values[group]; }, 0) / spec.divisor;
    });
    const highest = Math.max.apply(null, sums), left = leftOf(highest), middle = Math.floor(groups / 2);
    const ends = new Map([[0, spec.ends[0]], [middle, spec.ends[1]], [groups - 1, spec.ends[2]]]);
    const narrow = look.width < 500;
    return option({grid: frame(left, narrow ? 32 : 14, 26, narrow ? 62 : 46),
      xAxis: {type: 'category', data: sums.map(function (unused, group) { return String(group); }),
        axisLine: {show: true, lineStyle: {color: colour('rule2')}}, axisTick: {show: false},
        axisLabel: Object.assign({interval: 0, formatter: function (group) { return say(ends.get(Number(group)) || ''); },
          margin: 8}, textStyle()),
        name: inLines(say(spec.x), look.width - 40), nameLocation: 'middle', nameGap: 28, nameTextStyle: Object.assign({lineHeight: 15}, textStyle())},
      yAxis: yAxis(highest, spec.unit, left), series: spec.values.map(function (values, phase) {
        return {type: 'bar', stack: 'phases', barCategoryGap: '15%', name: say(spec.names[phase]),
          itemStyle: {color: colour(spec.colours[phase]), borderColor: colour('paper'), borderWidth: 0.5},
          data: values.map(function (value) { return value / spec.divisor; })};
      }),
      tooltip: tooltip('axis', function (hits) {
        return lines(hits.map(function (hit) { return hit.seriesName + ' ' + figure(hit.value) + ' ' + spec.unit; })
          .concat([figure(sums[hits[0].dataIndex]) + ' ' + spec.unit]));
      })});
  }

  function timelines(spec, look) {
    const totals = spec.values[0].map(function (unused, index) {
      return spec.values.reduce(function (sum, values) { return sum + values[index]; }, 0) / spec.divisor;
    });
    const longest = Math.max.apply(null, totals), room = look.width - 110;
    const last = spec.values.length - 1;
    const low = look.height && look.height < 220;  // paper: ten bars in few lines
    return option({grid: frame(26, 58, 6, low ? 36 : 46),
      xAxis: xAxis(0, longest, ticksBetween(0, longest, Math.max(3, Math.floor(room / 60))), tick, say(spec.x)),
      yAxis: {type: 'category', inverse: true, data: totals.map(function (unused, index) { return String(index + 1); }),
        axisLine: {show: false, onZero: false}, axisTick: {show: false},
        axisLabel: Object.assign({margin: 8, interval: 0}, textStyle(), low ? {fontSize: 10} : {})},
      series: spec.values.map(function (values, phase) {
        return {type: 'bar', stack: 'phases', barCategoryGap: '30%', barMaxWidth: 18, name: say(spec.names[phase]),
          itemStyle: {color: colour(spec.colours[phase]), borderColor: colour('paper'), borderWidth: 0.5},
          label: Object.assign({show: phase === last, position: 'right', formatter: function (bar) {
            return figure(totals[bar.dataIndex]) + ' ' + spec.unit;
          }}, textStyle('ink2'), low ? {fontSize: 10} : {}),
          data: values.map(function (value) { return value / spec.divisor; })};
      }),
      tooltip: tooltip('axis', function (hits) {
        const index = hits[0].dataIndex;
        return lines([spec.requests[index]].concat(hits.map(function (hit) {
          return hit.seriesName + ' ' + figure(hit.value) + ' ' + spec.unit;
        }), [figure(totals[index]) + ' ' + spec.unit]));
      })});
  }

  function scatter(spec, look) {
    const points = pairs(spec.points), xs = points.map(function (point) { return point[0]; });
    const ys = points.map(function (point) { return point[1] / spec.divisor; });
    const place = spec.log ? Math.log10 : function (value) { return value; };
    const highest = Math.max.apply(null, ys), left = leftOf(highest);
    const most = Math.max.apply(null, xs), step = roundStep(most, 7);
    const low = spec.log ? Math.log10(Math.min.apply(null, xs)) - 0.05 : 0;
    const high = spec.log ? Math.log10(most) + 0.05 : Math.ceil(most / step - 1e-9) * step;
    const ticks = spec.log ? logTicks(low, high, look.width - 60)
      : ticksBetween(low, high, Math.max(3, Math.floor((look.width - left) / 70)));
    const label = spec.log ? function (value) { return tick(Number(Math.pow(10, value).toPrecision(3))); } : tick;
    return option({grid: frame(left, 22, 26, 44), xAxis: xAxis(low, high, ticks, label, say(spec.x)),
      yAxis: yAxis(highest, say(spec.y), left),
      series: [{type: 'scatter', symbolSize: 4.5, itemStyle: {color: colour('p95'), opacity: points.length > 600 ? 0.32 : 0.5},
        data: points.map(function (point) { return [place(point[0]), point[1] / spec.divisor]; })}],
      tooltip: tooltip('item', function (hit) {
        return lines([figure(ys[hit.dataIndex]) + ' ' + spec.unit, tick(xs[hit.dataIndex]) + ' · ' + say(spec.x)]);
      })});
  }

  function loadOption(spec, look) {
    const logs = spec.loads.map(function (load, index) { return spec.names ? index : Math.log2(load); });
    const values = [].concat.apply([], spec.series.map(function (one) { return one.values; }));
    const limits = spec.limits || [];
    const highest = Math.max.apply(null, values.concat(limits.map(function (limit) { return limit.value; })));
    const left = leftOf(highest), named = spec.series.some(function (one) { return one.name; });
    const only = logs[0] === logs[logs.length - 1] ? 0.5 : 0;  // all at one load: it stands in the middle
    const low = logs[0] - only, high = logs[logs.length - 1] + only;
    const label = function (value) {
      const index = logs.findIndex(function (log) { return Math.abs(log - value) < 1e-9; });
      return index < 0 ? '' : spec.names ? spec.names[index] : tick(spec.loads[index]);
    };
    const places = logs.filter(function (log, index) { return index === 0 || log > logs[index - 1]; });  // a repeat: one tick
    const x = xAxis(low, high, spec.names ? places : apart(places, look.width - left - 60, low, high), label, say(spec.x));
    const y = yAxis(highest, say(spec.y), left);
    const series = spec.series.map(function (one) {
      return {type: 'line', name: one.name, symbol: 'circle', symbolSize: 6, clip: false, z: 3,
        lineStyle: {color: colour(one.colour), width: spec.names ? 0 : 1.8}, itemStyle: {color: colour(one.colour)},
        label: one.labels ? Object.assign({show: true, position: 'top', formatter: function (hit) {  // of a repeat only the last is named
          return logs[hit.dataIndex + 1] === hit.value[0] ? '' : figure(hit.value[1]);
        }},
          textStyle('ink')) : {show: false},
        data: one.values.map(function (value, index) { return [logs[index], value]; })};
    });
    if (spec.linear) {
      series.unshift({type: 'line', silent: true, showSymbol: false, z: 1, lineStyle: {color: colour('rule2'), width: 1.2, type: [4, 3]},
        data: spec.linear.map(function (value, index) { return [logs[index], value]; }), tooltip: {show: false}});
    }
    if (named) {
      series.push(endNames(spec.series.map(function (one) {
        return {name: one.name, colour: one.colour, points: one.values.map(function (value, index) { return [logs[index], value]; })};
      })));
    }
    if (limits.length) series.push(limitLines(limits, low));
    const end = spec.names ? width(spec.names[spec.names.length - 1]) / 2 + 4 : 0;
    return option({grid: frame(left, Math.max(named ? 44 : 26, end), 30, 44), xAxis: x, yAxis: y, series: series,
      tooltip: tooltip('item', function (hit) {
        return lines([label(hit.value[0]) + ' · ' + say(spec.x), (hit.seriesName[0] === 'P' ? hit.seriesName + ' ' : '') +
          figure(hit.value[1]) + ' ' + say(spec.y)]);
      })});
  }
  function apart(places, room, low, high) {  // ticks that don't run into each other: those at least 30 px after the last
    const kept = [];
    places.forEach(function (place) {
      if (!kept.length || (place - kept[kept.length - 1]) / (high - low || 1) * room >= 30) kept.push(place);
    });
    return kept;
  }
  function limitLines(limits, low) {
    return {type: 'custom', name: 'limits', silent: true, z: 4, tooltip: {show: false}, encode: {x: 0, y: 1},
      data: limits.map(function (limit) { return [low, limit.value]; }),
      renderItem: function (params, api) {
        const plot = params.coordSys, y = api.coord([low, limits[params.dataIndex].value])[1];
        return {type: 'group', children: [
          {type: 'line', shape: {x1: plot.x, x2: plot.x + plot.width, y1: y, y2: y},
            style: {stroke: colour('bad'), lineWidth: 1.2, lineDash: [4, 3]}},
          {type: 'text', style: {text: say(limits[params.dataIndex].text), x: plot.x + 6, y: y - 4, verticalAlign: 'bottom',
            fill: colour('bad'), fontSize: 12, fontFamily: FONT, stroke: colour('paper'), lineWidth: 3}}]};
      }};
  }

  function tradeOff(spec, look) {
    const xs = spec.points.map(function (point) { return point[0]; }), ys = spec.points.map(function (point) { return point[1]; });
    const highest = Math.max.apply(null, ys), left = leftOf(highest), most = Math.max.apply(null, xs), step = roundStep(most, 7);
    const high = Math.ceil(most / step - 1e-9) * step;
    const ticks = ticksBetween(0, high, Math.max(3, Math.floor((look.width - left) / 60)));
    const labelWidth = function (index) { return width(say(spec.labels[index])) + (spec.failed[index] ? 16 : 0); };
    const stages = {type: 'custom', z: 4, clip: false, encode: {x: 0, y: 1}, data: spec.points,
      renderItem: function (params, api) {
        const index = params.dataIndex, failed = spec.failed[index], at = api.coord(spec.points[index]), plot = params.coordSys;
        const left = at[0] + labelWidth(index) + 14 > look.width;
        const beside = spec.points.some(function (point, other) {
          const spot = api.coord(point);
          return other !== index && Math.abs(spot[1] - at[1]) < 13 && (left ? at[0] - spot[0] : spot[0] - at[0]) > 0 &&
            Math.abs(spot[0] - at[0]) < 30;
        });
        const flip = left || (beside && at[0] - plot.x > labelWidth(index) + 12);
        return {type: 'group', children: [
          {type: 'circle', shape: {cx: at[0], cy: at[1], r: failed ? 5 : 6}, style: {fill: failed ? colour('paper') : colour('a'),
            stroke: failed ? colour('bad') : colour('a'), lineWidth: failed ? 2 : 0}},
          {type: 'text', style: {text: say(spec.labels[index]) + (failed ? ' ✕' : ''), x: at[0] + (flip ? -12 : 12), y: at[1],
            align: flip ? 'right' : 'left', verticalAlign: 'middle', fill: colour(failed ? 'bad' : 'ink'),
            fontWeight: 600, fontSize: 12, fontFamily: FONT, stroke: colour('paper'), lineWidth: 3}}]};
      }};
    const last = spec.points.map(function (point, index) { return point[0] > 0.85 * high && index ? labelWidth(index) : 0; });
    const right = Math.max(look.width < 500 ? width(say(spec.labels[0])) + 22 : 20, Math.max.apply(null, last) + 22);
    return option({grid: frame(left, right, 30, 44), xAxis: xAxis(0, high, ticks, tick, say(spec.x)),
      yAxis: yAxis(highest, say(spec.y), left),
      series: [{type: 'line', silent: true, showSymbol: false,
        lineStyle: {color: colour('rule2'), width: spec.names ? 0 : 1.2}, data: spec.points, tooltip: {show: false}}, stages],
      tooltip: tooltip('item', function (hit) {
        return lines([say(spec.labels[hit.dataIndex]), figure(xs[hit.dataIndex]) + ' · ' + say(spec.x),
          figure(ys[hit.dataIndex]) + ' · ' + say(spec.y)]);
      })});
  }

  const KINDS = {histogram: histogram, strip: strip, curves: curves, time: timeOption, phases: phases, timelines: timelines, scatter: scatter,
    load: loadOption, tradeoff: tradeOff};

  // What is behind a chart, as rows of raw numbers (times in ms): the Data table and TSV

  const TABLES = {
    histogram: function (spec) {
      return [[word('column.from') + ', ms', word('column.to') + ', ms', word('column.count')]].concat(
        spec.counts.map(function (count, index) { return [spec.edges[index], spec.edges[index + 1], count]; }));
    },
    strip: function (spec) { return [['ms']].concat(spec.values.map(function (value) { return [value]; })); },
    curves: function (spec) {
      const head = [word('column.metric'), 'ms', word('column.share')];
      return [head].concat([].concat.apply([], spec.series.map(function (one) {
        return pairs(one.points).map(function (point) { return [say(one.name)].concat(point); });
      })));
    },
    time: function (spec) {
      const unit = say(spec.y);
      if (spec.form === 'dots') return [[word('column.time'), unit]].concat(pairs(spec.series[0].points));
      const head = [word('column.time')].concat(spec.series.map(function (one) { return (one.name ? one.name + ', ' : '') + unit; }));
      return [head].concat(spec.series[0].values.map(function (unused, index) {
        return [index * spec.step].concat(spec.series.map(function (one) { return one.values[index]; }));
      }));
    },
    phases: function (spec) {
      return [[word('column.group')].concat(spec.names.map(function (name) { return say(name) + ', ms'; }))].concat(
        spec.values[0].map(function (unused, group) {
          return [group + 1].concat(spec.values.map(function (values) { return values[group]; }));
        }));
    },
    timelines: function (spec) {
      return [[word('column.request')].concat(spec.names.map(function (name) { return say(name) + ', ms'; }))].concat(
        spec.requests.map(function (request, index) {
          return [request].concat(spec.values.map(function (values) { return values[index]; }));
        }));
    },
    scatter: function (spec) { return [[say(spec.x), say(spec.y).split(',')[0] + ', ms']].concat(pairs(spec.points)); },
    load: function (spec) {
      return [[word('column.load')].concat(spec.series.map(function (one) { return (one.name ? one.name + ', ' : '') + say(spec.y); }))]
        .concat(spec.loads.map(function (load, index) {
          return [spec.names ? spec.names[index] : load].concat(spec.series.map(function (one) { return one.values[index]; }));
        }));
    },
    tradeoff: function (spec) {
      return [[word('column.load'), say(spec.x), say(spec.y)]].concat(spec.points.map(function (point, index) {
        return [spec.loads[index]].concat(point);
      }));
    }
  };

  // Drawing

  function specOf(place) { return data.charts[place.dataset.chart]; }
  function draw(place) {
    if (!place.offsetWidth) return;
    const spec = specOf(place), known = drawn.get(place);
    const chart = known || echarts.init(place, null, {renderer: spec.kind === 'scatter' ? 'canvas' : 'svg'});
    if (!known) {
      drawn.set(place, chart);
      place.addEventListener('pointerenter', function () { hovered = place.dataset.chart; });
      if (spec.kind === 'time' && spec.form !== 'dots') chart.group = 'time-' + place.dataset.chart.split('-')[0];
      if (chart.group) echarts.connect(chart.group);
    }
    chart.setOption(KINDS[spec.kind](spec, {width: place.offsetWidth, name: place.dataset.chart}), true);
    root.dataset.charts = String(drawn.size);
  }
  function redraw() { drawn.forEach(function (chart, place) { draw(place); }); }

  // Charts near the viewport are drawn at once, the others when they come near
  function tryToDraw(place) {
    try { draw(place); } catch (error) { failed(place.dataset.chart + ': ' + error.message); }
  }
  const watcher = new IntersectionObserver(function (entries) {
    entries.forEach(function (entry) {
      if (entry.isIntersecting && !drawn.has(entry.target)) tryToDraw(entry.target);
      if (drawn.has(entry.target)) watcher.unobserve(entry.target);
    });
  }, {rootMargin: '600px'});
  function start() {
    places.forEach(function (place) {
      if (place.offsetWidth && place.getBoundingClientRect().top < window.innerHeight + 600) tryToDraw(place);
      if (!drawn.has(place)) watcher.observe(place);
    });
  }

  let resizing = 0;
  window.addEventListener('resize', function () {
    clearTimeout(resizing);
    resizing = setTimeout(function () {
      drawn.forEach(function (chart, place) {
        if (place.offsetWidth) { chart.resize({width: 'auto', height: 'auto'}); draw(place); }
      });
    }, 80);
  });

  // Paper: each chart again as vectors at the width of its column; a resize would come too late

  function asVectors(spec, name, width, height) {
    const chart = echarts.init(null, null, {renderer: 'svg', ssr: true, width: width, height: height});
    chart.setOption(KINDS[spec.kind](spec, {width: width, height: height, name: name}));
    const text = chart.renderToSVGString();
    chart.dispose();
    return text;
  }
  function inLight(work) {
    const before = root.dataset.theme;
    root.dataset.theme = 'light';
    try { return work(); } finally { if (before) root.dataset.theme = before; else delete root.dataset.theme; }
  }
  function heightOnPaper(place) {
    const panel = place.closest('.panel');
    return panel.classList.contains('small') ? 112 : panel.classList.contains('wide') ? 188 : 164;
  }
  function onPaper(place) {
    const panel = place.closest('.panel'), spec = specOf(place), copy = document.createElement('div');
    copy.className = 'printed';
    copy.innerHTML = asVectors(spec, place.dataset.chart, panel.classList.contains('wide') ? 695 : 336, heightOnPaper(place));
    place.after(copy);
  }
  window.addEventListener('beforeprint', function () {
    document.querySelectorAll('.printed').forEach(function (copy) { copy.remove(); });
    inLight(function () {
      places.filter(function (place) { return !place.closest('[hidden], details:not([open])'); }).forEach(onPaper);
    });
  });
  window.addEventListener('afterprint', function () {
    document.querySelectorAll('.printed').forEach(function (copy) { copy.remove(); });
  });

  // Buttons

  const CONTROLS = {
    language: function () {
      const chinese = !language();
      root.classList.toggle('zh', chinese);
      root.classList.toggle('en', !chinese);
      root.lang = chinese ? 'zh-CN' : 'en';
      document.querySelectorAll('.data-table').forEach(function (table) { table.remove(); });
      document.querySelectorAll('[data-tool="data"]').forEach(function (button) { button.setAttribute('aria-expanded', 'false'); });
      redraw();
    },
    theme: function () { root.dataset.theme = isDark() ? 'light' : 'dark'; redraw(); },
    print: function () { window.print(); }
  };
  root.dataset.theme = isDark() ? 'dark' : 'light';
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', function (event) {
    root.dataset.theme = event.matches ? 'dark' : 'light';
    redraw();
  });

  function tableOf(rows) {
    const box = document.createElement('div'), table = box.appendChild(document.createElement('table'));
    box.className = 'data-table';
    box.tabIndex = 0;
    const head = table.createTHead().insertRow(), body = table.createTBody();
    rows[0].forEach(function (text) {
      const cell = head.appendChild(document.createElement('th'));
      cell.scope = 'col';
      cell.className = 'number';
      cell.textContent = text;
    });
    rows.slice(1).forEach(function (row) {
      const line = body.insertRow();
      row.forEach(function (value) {
        const cell = line.insertCell();
        cell.className = 'number';
        cell.textContent = typeof value === 'number' ? tick(Number(value.toPrecision(6))) : value == null ? '–' : value;
      });
    });
    return box;
  }
  function copied(button, text) {
    const before = button.innerHTML, done = function () {
      button.textContent = word('state.copied');
      setTimeout(function () { button.innerHTML = before; }, 1200);
    };
    if (navigator.clipboard && window.isSecureContext) navigator.clipboard.writeText(text).then(done, function () { byHand(text); done(); });
    else { byHand(text); done(); }
  }
  function byHand(text) {
    const area = document.body.appendChild(document.createElement('textarea'));
    area.value = text;
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  function tsv(rows) {
    return rows.map(function (row) { return row.map(function (value) { return value == null ? '' : value; }).join('\t'); }).join('\n') + '\n';
  }
  function picture(place) {  // twice the size, on paper, with what it is of
    const spec = specOf(place), wide = place.offsetWidth, high = place.offsetHeight, top = 44;
    const image = new Image();
    image.onload = function () {
      const canvas = document.createElement('canvas');
      canvas.width = 2 * (wide + 24);
      canvas.height = 2 * (high + top + 8);
      const pen = canvas.getContext('2d');
      pen.scale(2, 2);
      pen.fillStyle = colour('paper');
      pen.fillRect(0, 0, wide + 24, high + top + 8);
      pen.fillStyle = colour('ink');
      pen.font = '600 14px ' + FONT;
      pen.fillText(say(spec.title), 12, 20);
      pen.fillStyle = colour('ink3');
      pen.font = '12px ' + FONT;
      pen.fillText(data.model + ' · ' + data.run, 12, 38, wide);
      pen.drawImage(image, 12, top, wide, high);
      const link = document.createElement('a');
      link.download = 'llmbench-' + place.dataset.chart + '.png';
      link.href = canvas.toDataURL('image/png');
      link.click();
    };
    image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(asVectors(spec, place.dataset.chart, wide, high));
  }
  const TOOLS = {
    data: function (button, panel, place) {
      const table = panel.querySelector('.data-table'), open = !table;
      if (table) table.remove(); else place.after(tableOf(TABLES[specOf(place).kind](specOf(place))));
      button.setAttribute('aria-expanded', String(open));
    },
    tsv: function (button, panel, place) { copied(button, tsv(TABLES[specOf(place).kind](specOf(place)))); },
    png: function (button, panel, place) { picture(place); },
    copy: function (button, panel) {
      copied(button, tsv(Array.from(panel.querySelectorAll('tr')).map(function (row) {
        return Array.from(row.cells).map(function (cell) { return cell.innerText.trim().replace(/†|,(?=\d{3})/g, ''); });
      })));
    }
  };
  function pick(number) {
    const ids = Array.from(document.querySelectorAll('.stage > .part[id]'));
    ids.forEach(function (part) { part.removeAttribute('id'); });
    document.querySelectorAll('.stage').forEach(function (stage) {
      stage.hidden = stage.dataset.stage !== number;
      if (!stage.hidden) stage.querySelectorAll('.part').forEach(function (part) { part.id = part.dataset.anchor; });
    });
    document.querySelectorAll('[data-pick]').forEach(function (button) {
      button.setAttribute('aria-pressed', String(button.dataset.pick === number));
    });
    document.querySelectorAll('.stages tbody tr').forEach(function (row, index) { row.classList.toggle('chosen', String(index) === number); });
  }

  document.addEventListener('click', function (event) {
    const button = event.target.closest('button');
    document.querySelectorAll('.term.open').forEach(function (term) { if (term !== button) term.classList.remove('open'); });
    if (!button) return;
    const panel = button.closest('.panel');
    if (button.dataset.control) CONTROLS[button.dataset.control]();
    else if (button.dataset.tool) TOOLS[button.dataset.tool](button, panel, panel.querySelector('.chart'));
    else if (button.dataset.pick) pick(button.dataset.pick);
    else if (button.classList.contains('term')) { button.classList.remove('closed'); button.classList.toggle('open'); }
  });
  document.addEventListener('keydown', function (event) {
    if (event.key !== 'Escape') return;
    document.querySelectorAll('.term').forEach(function (term) { term.classList.remove('open'); term.classList.add('closed'); });
  });
  document.addEventListener('focusin', function (event) { if (event.target.classList.contains('term')) event.target.classList.remove('closed'); });
  document.addEventListener('pointerover', function (event) {
    if (event.target.classList && event.target.classList.contains('term')) event.target.classList.remove('closed');
  });
  window.addEventListener('beforeprint', function () {
    document.querySelectorAll('.term.open').forEach(function (term) { term.classList.remove('open'); });
  });
  start();
  root.dataset.places = String(places.filter(function (place) { return !place.closest('[hidden], details:not([open])'); }).length);
})();
