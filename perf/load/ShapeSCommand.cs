using System.CommandLine;
using Rollout.Kernels;
using Spectre.Console;

namespace Rollout.Load;

/// <summary>`shape-s`.</summary>
internal static class ShapeSCommand
{
    public static Command Create(Option<bool> json)
    {
        Option<int> threads = new("--threads") { Description = "Cores to use.", DefaultValueFactory = _ => Environment.ProcessorCount };
        Option<int> repetitions = new("--repetitions") { Description = "Rounds a number is the median of.", DefaultValueFactory = _ => 5 };
        Option<int[]> batches = new("--batches")
        {
            Description = "Batch sizes to decode at.",
            DefaultValueFactory = _ => [1, 8, 16, 32, 64],
            AllowMultipleArgumentsPerToken = true,
        };
        Option<string[]> weights = new("--weights")
        {
            Description = "Weight formats, as --dtype of `rollout serve` names them.",
            DefaultValueFactory = _ => WeightFormats.CpuNames,
            AllowMultipleArgumentsPerToken = true,
        };
        weights.AcceptOnlyFromAmong(WeightFormats.CpuNames);
        Option<string[]> peers = new("--peer")
        {
            Description = "LABEL=PATH of a llama-batched-bench to run beside (llama.cpp=..., ik_llama.cpp=...).",
            HelpName = "LABEL=PATH",
        };
        Command command = new("shape-s", "Prefill and decode rates of Shape S, in process, beside the machine's limits and peers.")
        {
            json, threads, repetitions, batches, weights, peers,
        };
        foreach (Option<int> option in new[] { threads, repetitions })
        {
            option.Validators.Add(result =>
            {
                if (result.GetValueOrDefault<int>() < 1) result.AddError($"{option.Name}: must be at least 1");
            });
        }

        batches.Validators.Add(result =>
        {
            if (result.GetValueOrDefault<int[]>()!.Any(batch => batch is < 1 or > 64)) result.AddError("--batches: from 1 to 64");
        });
        command.SetAction(async (arguments, _) =>
        {
            BatchedBench[] run;
            try
            {
                run = [.. (arguments.GetValue(peers) ?? []).Select(peer => BatchedBench.Parse(peer, arguments.GetValue(threads)))];
            }
            catch (ArgumentException e)
            {
                await Console.Error.WriteLineAsync(e.Message);
                return 1;
            }

            ShapeSWork work = new(
                [.. arguments.GetValue(weights)!.Select(WeightFormats.Parse)],
                [.. arguments.GetValue(batches)!.Order()], arguments.GetValue(threads), arguments.GetValue(repetitions), run);
            if (arguments.GetValue(json))
            {
                ShapeSReport.PrintJson(await ShapeSRates.MeasureAsync(work, new Progress<string>()));
                return 0;
            }

            ShapeSReport.PrintTable(await AnsiConsole.Status().StartAsync("Shape S", status =>
                ShapeSRates.MeasureAsync(work, new Progress<string>(text => status.Status(text)))));
            return 0;
        });
        return command;
    }
}
