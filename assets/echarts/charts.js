// The parts of ECharts that report.js draws with; `python3 build.py charts` makes echarts.min.js of them.
import {connect, init, use} from 'echarts/core';
import {BarChart, CustomChart, LineChart, ScatterChart} from 'echarts/charts';
import {GridComponent, TooltipComponent} from 'echarts/components';
import {CanvasRenderer, SVGRenderer} from 'echarts/renderers';

use([BarChart, CustomChart, LineChart, ScatterChart, GridComponent, TooltipComponent, CanvasRenderer, SVGRenderer]);
window.echarts = {connect: connect, init: init};
