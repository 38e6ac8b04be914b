using System.Text.Json;
using Spectre.Console;

namespace Rollout.Load;

/// <summary>Shows the result with the targets.</summary>
internal static class WeightUpdatesReport
{
    private const double MostSharedMemory = 2.0;
    private const double MostInPlace = 1.5;
    private const double LeastInline = 0.7;
    private const double StallBeyondStep = 0.002;

    public static void PrintJson(WeightUpdatesResult result) => Console.WriteLine(JsonSerializer.Serialize(new
    {
        bytes = result.Bytes,
        memcpy_s = Round(result.Memcpy),
        shared_memory_s = Round(result.SharedMemory),
        stall_s = Round(result.Stall),
        step_s = Round(result.Step),
        in_place_s = result.InPlace is { } seconds ? Round(seconds) : (double?)null,
        inline_s = Round(result.Inline),
        socket_s = Round(result.Socket),
    }));

    public static void PrintTable(WeightUpdatesResult result)
    {
        Table table = new() { Title = new TableTitle($"Weight updates of Shape S, {result.Bytes / 1e6:F0} MB, {result.Backend}") };
        table.AddColumns("what", "ms", "GB/s", "ratio", "target", "");
        Row("memcpy", result.Memcpy);
        Row("Unix socket", result.Socket);
        double shared = result.SharedMemory / result.Memcpy;
        Row("shared memory", result.SharedMemory, $"{shared:F2}x memcpy", $"<= {MostSharedMemory:F1}x", shared <= MostSharedMemory);
        Row(
            $"  while {BackgroundDecode.Sequences} decode", result.SharedMemoryLoaded,
            $"{result.SharedMemoryLoaded / result.Memcpy:F2}x memcpy");
        if (result.InPlace is { } seconds)
        {
            double inPlace = seconds / result.Memcpy;
            Row("pause in place", seconds, $"{inPlace:F2}x memcpy", $"<= {MostInPlace:F1}x", inPlace <= MostInPlace);
        }
        else
        {
            table.AddRow("pause in place", "-", "", "", $"<= {MostInPlace:F1}x", "not measured");
        }

        double inline = result.Socket / result.Inline;
        Row("gRPC inline", result.Inline, $"{inline:P0} of socket", $">= {LeastInline:P0}", inline >= LeastInline);
        Time($"decode step of {BackgroundDecode.Sequences}", result.Step);
        Time("stall", result.Stall, $"{result.Stall / result.Step:F3} steps",
            $"<= step + {StallBeyondStep * 1e3:F0} ms", result.Stall <= result.Step + StallBeyondStep);
        Time("  client, swap", result.CommitGap);
        Time("  client, reading", result.TransferGap);
        table.Caption = new TableTitle($"FMA peak {result.FmaGflops:F0} GFLOP/s, read {result.ReadGBps:F1} GB/s");
        AnsiConsole.Write(table);
        AnsiConsole.MarkupLine(
            "Client: its longest wait for a step's tokens beyond the usual one, around the swap and while the server read the payload.");
        if (result.NoInPlace is not null) AnsiConsole.MarkupLineInterpolated($"In place: {result.NoInPlace}.");

        void Row(string what, double took, string ratio = "", string target = "", bool? met = null)
            => table.AddRow(what, $"{took * 1e3:F1}", $"{result.Bytes / took / 1e9:F2}", ratio, target, Verdict(met));

        void Time(string what, double took, string ratio = "", string target = "", bool? met = null)
            => table.AddRow(what, $"{took * 1e3:F2}", "", ratio, target, Verdict(met));
    }

    private static string Verdict(bool? met) => met switch { true => "met", false => "missed", null => "" };

    private static double Round(double seconds) => Math.Round(seconds, 6);
}
