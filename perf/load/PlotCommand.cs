using System.CommandLine;
using System.Text.Json;
using Rollout.Examples.Grpo;
using ScottPlot;
using ScottPlot.Plottables;

namespace Rollout.Load;

/// <summary>`plot`: throughput against batch size, from what `shape-s --json` printed.</summary>
internal static class PlotCommand
{
    private const int Width = 900;
    private const int Height = 560;

    /// <summary>Rollout's formats in blues and green, solid; peers in warm colours, dashed.</summary>
    private static readonly string[] s_own = ["#0b3d91", "#2e8bc0", "#1b998b"];

    private static readonly string[] s_peers = ["#e4572e", "#f3a712", "#a4243b", "#7b2d8b"];

    public static Command Create()
    {
        Argument<FileInfo> json = new("FILE") { Description = "What `shape-s --json` printed." };
        Option<string> output = new("--output") { Description = "The picture.", DefaultValueFactory = _ => "perf/throughput.png" };
        json.AcceptExistingOnly();
        Command command = new("plot", "Draws throughput against batch size, with the peers and the machine's limits.") { json, output };
        command.SetAction(arguments =>
        {
            using JsonDocument document = JsonDocument.Parse(File.ReadAllText(arguments.GetValue(json)!.FullName));
            Draw(document.RootElement, Path.GetFullPath(arguments.GetValue(output)!));
        });
        return command;
    }

    private static void Draw(JsonElement result, string path)
    {
        PlotFont.Install();
        Plot plot = new();
        int own = 0, peers = 0;
        List<double> batches = [];
        IEnumerable<JsonProperty> objects = result.EnumerateObject().Where(entry => entry.Value.ValueKind == JsonValueKind.Object);
        foreach (JsonProperty entry in objects.Where(entry => entry.Name != "decode"))
        {
            if (entry.Name == "peer")
            {
                foreach (JsonProperty peer in entry.Value.EnumerateObject())
                    Line(plot, peer.Name, peer.Value, s_peers[peers++ % s_peers.Length], LinePattern.Dashed);
                continue;
            }

            batches = Line(plot, $"Rollout {entry.Name}", entry.Value, s_own[own++ % s_own.Length], LinePattern.Solid);
        }

        double flops = result.GetProperty("fma_gflops").GetDouble() * 1e9;
        double bandwidth = result.GetProperty("read_gbps").GetDouble() * 1e9;
        double weights = ShapeSReport.LayerWeights + ShapeSReport.HeadWeights;
        Scatter limit = plot.Add.Scatter(
            batches.Select(Math.Log2).ToArray(),
            batches.Select(batch => Math.Min(flops / (2 * weights), bandwidth * batch / (2 * weights))).ToArray());
        (limit.Color, limit.LinePattern, limit.LineWidth, limit.MarkerSize) = (Colors.Gray, LinePattern.Dotted, 2, 0);
        limit.LegendText = "limit of bf16 weights, fp32 arithmetic";

        plot.Axes.Bottom.SetTicks(batches.Select(Math.Log2).ToArray(), batches.Select(batch => $"{batch}").ToArray());
        plot.Axes.SetLimitsY(0, plot.Axes.GetLimits().Top * 1.05);
        plot.XLabel("batch size (sequences decoding together)");
        plot.YLabel("tokens per second");
        plot.Title("Shape S (387 M parameters), decode on 2 cores");
        plot.ShowLegend(Alignment.UpperLeft);
        plot.SavePng(path, Width, Height);
    }

    private static List<double> Line(Plot plot, string name, JsonElement run, string color, LinePattern pattern)
    {
        (double Batch, double Rate)[] points =
        [
            .. run.GetProperty("decode").EnumerateObject()
                .Select(entry => (double.Parse(entry.Name), entry.Value.GetDouble()))
                .OrderBy(point => point.Item1),
        ];
        Scatter line = plot.Add.Scatter(
            points.Select(point => Math.Log2(point.Batch)).ToArray(),
            points.Select(point => point.Rate).ToArray());
        (line.Color, line.LinePattern, line.LineWidth, line.MarkerSize) = (Color.FromHex(color), pattern, 2.5f, 7);
        line.LegendText = name;
        return [.. points.Select(point => point.Batch)];
    }
}
