using System.Text.Json;
using System.Text.Json.Nodes;
using Rollout.Kernels;
using Spectre.Console;

namespace Rollout.Load;

/// <summary>Prints what <see cref="ShapeSRates"/> measured.</summary>
internal static class ShapeSReport
{
    // Multiply-adds of a token: every weight of the layers and the head once; the head only where a token is sampled.
    public const double LayerWeights = 24 * (896.0 * 1152 + 896 * 896 + 3 * 896 * 4864);
    public const double HeadWeights = 896.0 * 32768;

    /// <summary>bf16's numbers are also at the top level, where earlier versions had them.</summary>
    public static void PrintJson(ShapeSResult result)
    {
        JsonObject json = [];
        foreach ((string name, Throughput run) in result.Runs.Where(run => !run.Key.Contains(' '))) json[name] = Node(run);
        JsonObject peers = [];
        foreach ((string name, Throughput run) in result.Runs.Where(run => run.Key.Contains(' '))) peers[name] = Node(run);
        if (peers.Count > 0) json["peer"] = peers;
        if (result.Runs.TryGetValue("bf16", out Throughput? bf16))
        {
            JsonObject top = Node(bf16);
            json["prefill_256"] = top["prefill_256"]!.DeepClone();
            json["decode"] = top["decode"]!.DeepClone();
        }

        foreach ((string name, LogProbError error) in result.LogProbErrors)
            json[name]!["logprob_error"] = new JsonObject { ["mean"] = Math.Round(error.Mean, 6), ["worst"] = Math.Round(error.Worst, 5) };
        json["fma_gflops"] = Math.Round(result.FmaGflops, 1);
        json["read_gbps"] = Math.Round(result.ReadGBps, 2);
        Console.WriteLine(json.ToJsonString(JsonSerializerOptions.Web));
    }

    public static void PrintTable(ShapeSResult result)
    {
        Table table = new() { Title = new TableTitle("Shape S, tokens/s") };
        table.AddColumn("work");
        foreach (string name in result.Runs.Keys) table.AddColumn(name);
        bool bf16 = result.Runs.ContainsKey("bf16");
        if (bf16) table.AddColumns("bf16 of FMA peak", "of read bandwidth");
        bool peers = result.Runs.Keys.Any(name => name.Contains(' '));
        if (peers) table.AddColumn("x better peer");
        Add("prefill 256", run => run.Prefill256, rate => rate * 2 * LayerWeights, _ => 0);
        foreach (int batch in result.Runs.Values.First().Decode.Keys)
        {
            Add($"decode, batch {batch}", run => run.Decode[batch],
                rate => rate * 2 * (LayerWeights + HeadWeights), rate => rate / batch * 2 * (LayerWeights + HeadWeights));
        }

        string caption = $"FMA peak {result.FmaGflops:F0} GFLOP/s, read {result.ReadGBps:F1} GB/s";
        foreach ((string name, LogProbError error) in result.LogProbErrors)
            caption += $"\n{name}'s log-probabilities are off by {error.Mean:F5} on average, {error.Worst:F4} at worst";
        table.Caption = new TableTitle(caption);
        AnsiConsole.Write(table);

        void Add(string work, Func<Throughput, double> rate, Func<double, double> flops, Func<double, double> bytes)
        {
            List<string> row = [work, .. result.Runs.Values.Select(run => $"{rate(run):F1}")];
            if (bf16)
            {
                double own = rate(result.Runs["bf16"]);
                row.Add($"{flops(own) / result.FmaGflops / 1e9:P0}");
                row.Add(bytes(own) == 0 ? "" : $"{bytes(own) / result.ReadGBps / 1e9:P0}");
            }

            if (peers) row.Add(string.Join(", ", Ratios(result, rate)));
            table.AddRow([.. row]);
        }
    }

    /// <summary>"bf16 2.10, int8 1.45": each format over its better peer.</summary>
    private static IEnumerable<string> Ratios(ShapeSResult result, Func<Throughput, double> rate)
    {
        foreach (string own in result.Runs.Keys.Where(name => !name.Contains(' ')))
        {
            string theirs = " " + ShapeSRates.GgufOf(WeightFormats.Parse(own));
            double[] peers =
                [.. result.Runs.Where(run => run.Key.EndsWith(theirs, StringComparison.Ordinal)).Select(run => rate(run.Value))];
            if (peers.Length > 0) yield return $"{own} {rate(result.Runs[own]) / peers.Max():F2}";
        }
    }

    private static JsonObject Node(Throughput run)
    {
        JsonObject decode = [];
        foreach ((int batch, double rate) in run.Decode) decode[$"{batch}"] = Math.Round(rate, 1);
        return new JsonObject { ["prefill_256"] = Math.Round(run.Prefill256, 1), ["decode"] = decode };
    }
}
