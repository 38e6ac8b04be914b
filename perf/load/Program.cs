using System.CommandLine;
using System.Text.Json;
using Rollout.Load;
using Spectre.Console;

Option<bool> json = new("--json") { Description = "Print one JSON object and nothing else." };
Option<int> threads = new("--threads") { Description = "Cores to use.", DefaultValueFactory = _ => Environment.ProcessorCount };
Option<int> repetitions = new("--repetitions") { Description = "Runs a number is the median of.", DefaultValueFactory = _ => 5 };
Option<int[]> batches = new("--batches")
{
    Description = "Batch sizes to decode at.",
    DefaultValueFactory = _ => [1, 8, 32],
    AllowMultipleArgumentsPerToken = true,
};

Command shapeS = new("shape-s", "Prefill and decode rates of Shape S (performance.md), in process, beside the machine's limits.")
{
    json, threads, repetitions, batches,
};
shapeS.SetAction(async (arguments, _) =>
{
    Progress<string> silent = new();
    ShapeSResult result = arguments.GetValue(json)
        ? await ShapeS.MeasureAsync(arguments.GetValue(batches)!, arguments.GetValue(threads), arguments.GetValue(repetitions), silent)
        : await AnsiConsole.Status().StartAsync("Shape S", status => ShapeS.MeasureAsync(arguments.GetValue(batches)!,
            arguments.GetValue(threads), arguments.GetValue(repetitions), new Progress<string>(text => status.Status(text))));
    if (arguments.GetValue(json)) PrintJson(result);
    else PrintTable(result);
    return 0;
});

Option<int> repeats = new("--repeats") { Description = "Rounds a number is the median of, after one to warm up.", DefaultValueFactory = _ => 5 };
repeats.Validators.Add(result =>
{
    if (result.GetValueOrDefault<int>() < 1) result.AddError("--repeats: must be at least 1");
});
Command weights = new("weights", "Weight updates of Shape S into a sidecar of its own, beside the machine's own copies.") { json, repeats };
weights.SetAction(async (arguments, cancellation) =>
{
    int rounds = arguments.GetValue(repeats);
    if (arguments.GetValue(json))
    {
        WeightUpdatesResult result = await WeightUpdates.MeasureAsync(rounds, new Progress<string>(), cancellation);
        if (result.NoInPlace is not null) await Console.Error.WriteLineAsync($"in_place_s: {result.NoInPlace}");
        WeightUpdatesReport.PrintJson(result);
        return 0;
    }

    WeightUpdatesReport.PrintTable(await AnsiConsole.Status().StartAsync("Weight updates", status =>
        WeightUpdates.MeasureAsync(rounds, new Progress<string>(text => status.Status(text)), cancellation)));
    return 0;
});

// Long enough to stop the sidecar and remove what was made, when Ctrl+C ends a measurement.
InvocationConfiguration configuration = new() { ProcessTerminationTimeout = TimeSpan.FromSeconds(15) };
return await new RootCommand("Measures Rollout on this machine. Results are written to perf/RESULTS.md by hand, with machine and commit.")
{
    shapeS, weights, Frames.Create(json, repeats),
}.Parse(args).InvokeAsync(configuration);

static void PrintJson(ShapeSResult result) => Console.WriteLine(JsonSerializer.Serialize(new
{
    prefill_256 = Math.Round(result.Prefill256, 1),
    decode = result.Decode.ToDictionary(entry => entry.Key.ToString(), entry => Math.Round(entry.Value, 1)),
    fma_gflops = Math.Round(result.FmaGflops, 1),
    read_gbps = Math.Round(result.ReadGBps, 2),
}));

static void PrintTable(ShapeSResult result)
{
    // Multiply-adds of a token: every weight of the layers and the head once; the head only where a token is sampled.
    const double LayerWeights = 24 * (896.0 * 1152 + 896 * 896 + 3 * 896 * 4864);
    const double HeadWeights = 896.0 * 32768;
    Table table = new() { Title = new TableTitle($"Shape S, {result.Backend}") };
    table.AddColumns("work", "tokens/s", "of FMA peak", "of read bandwidth");
    double prefillFlops = result.Prefill256 * 2 * LayerWeights;
    table.AddRow("prefill 256", $"{result.Prefill256:F0}", $"{prefillFlops / result.FmaGflops / 1e9:P0}", "");
    foreach ((int batch, double rate) in result.Decode)
    {
        double flops = rate * 2 * (LayerWeights + HeadWeights);
        double bytes = rate / batch * 2 * (LayerWeights + HeadWeights);
        table.AddRow($"decode, batch {batch}", $"{rate:F1}", $"{flops / result.FmaGflops / 1e9:P0}", $"{bytes / result.ReadGBps / 1e9:P0}");
    }

    table.Caption = new TableTitle($"FMA peak {result.FmaGflops:F0} GFLOP/s, read {result.ReadGBps:F1} GB/s");
    AnsiConsole.Write(table);
}
