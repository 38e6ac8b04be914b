using System.CommandLine;
using Rollout.Load;
using Rollout.Load.Bench;
using Spectre.Console;

Option<bool> json = new("--json") { Description = "Print one JSON object and nothing else." };
Option<int> repeats = new("--repeats")
{
    Description = "Rounds a number is the median of, after one to warm up.",
    DefaultValueFactory = _ => 5,
};
repeats.Validators.Add(result =>
{
    if (result.GetValueOrDefault<int>() < 1) result.AddError("--repeats: must be at least 1");
});
Option<string?> device = new("--device")
{
    Description = "A GPU for the sidecar, cuda or cuda:N: pushes from this process's memory on the first GPU are measured.",
};
Option<string> transport = new("--transport")
{
    Description = "How weights reach the GPU: ipc (the sidecar is on the first GPU), nccl (on another), or shared-memory.",
    DefaultValueFactory = _ => "ipc",
};
transport.AcceptOnlyFromAmong("ipc", "nccl", "shared-memory");
Option<string?> model = new("--model") { Description = "With --device: a folder with model.safetensors. Default: Shape S." };
Command weights = new("weights", "Weight updates of Shape S into a sidecar of its own, beside the machine's own copies.")
{
    json, repeats, device, transport, model,
};
weights.SetAction(async (arguments, cancellation) =>
{
    int rounds = arguments.GetValue(repeats);
    if (arguments.GetValue(device) is { } gpu)
    {
        return await DeviceUpdates.RunAsync(
            gpu, arguments.GetValue(transport)!, arguments.GetValue(model), rounds, arguments.GetValue(json), cancellation);
    }

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

// A table written to a file is not wrapped.
if (Console.IsOutputRedirected) AnsiConsole.Profile.Width = 200;

// Long enough to stop the sidecar and remove temporary files when Ctrl+C ends a measurement.
InvocationConfiguration configuration = new() { ProcessTerminationTimeout = TimeSpan.FromSeconds(15) };
return await new RootCommand("Measures Rollout on this machine. Results are written to perf/RESULTS.md by hand, with machine and commit.")
{
    ShapeSCommand.Create(json), BenchCommand.Create(json), weights, Frames.Create(json, repeats),
    StartUp.Create(json), PlotCommand.Create(),
}.Parse(args).InvokeAsync(configuration);
