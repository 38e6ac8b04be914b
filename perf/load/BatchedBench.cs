using System.Diagnostics;
using System.Globalization;

namespace Rollout.Load;

/// <summary>
/// A peer's llama-batched-bench (llama.cpp, ik_llama.cpp) on the same weights, prompts of the same length and the same number of tokens. A
/// peer that can repack its weights at run time does so, as its users would.
/// </summary>
internal sealed class BatchedBench(string label, string program, int threads, bool repacks)
{
    /// <summary>The user's name for it, such as llama.cpp.</summary>
    public string Label => label;

    /// <summary>LABEL=PATH, as --peer is written.</summary>
    /// <exception cref="ArgumentException">The program does not exist or does not start.</exception>
    public static BatchedBench Parse(string peer, int threads)
    {
        if (peer.Split('=', 2) is not [{ Length: > 0 } label, { Length: > 0 } program])
            throw new ArgumentException($"--peer: '{peer}' is not LABEL=PATH");
        if (!File.Exists(program)) throw new ArgumentException($"--peer: no program '{program}'");
        return new BatchedBench(
            label, program, threads, Run(program, ["--help"]).Output.Contains("--run-time-repack", StringComparison.Ordinal));
    }

    /// <summary>Tokens a second: of a 256-token prompt, and decoding at each batch size.</summary>
    public Throughput Measure(string gguf, IReadOnlyList<int> batches, int promptTokens, int decodeTokens, int prefillTokens)
    {
        double prefill = Bench(gguf, prefillTokens, 1, [1])[1].Prefill;
        SortedDictionary<int, double> decode = [];
        foreach ((int batch, (_, double rate)) in Bench(gguf, promptTokens, decodeTokens, batches)) decode[batch] = rate;
        return new Throughput(prefill, decode);
    }

    private Dictionary<int, (double Prefill, double Decode)> Bench(string gguf, int prompt, int decode, IReadOnlyList<int> batches)
    {
        List<string> arguments =
        [
            "-m", gguf, "-t", $"{threads}", "-tb", $"{threads}", "-c", $"{(batches.Max() * (prompt + decode)) + 512}",
            "-b", "2048", "-ub", "512",
            "-npp", $"{prompt}", "-ntg", $"{decode}", "-npl", string.Join(',', batches),
        ];
        if (repacks) arguments.Add("-rtr");
        (int code, string output, string errors) = Run(program, arguments);
        Dictionary<int, (double, double)> results = [];
        foreach (string line in (output + errors).Split('\n').Where(line => line.StartsWith('|')))
        {
            // | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | ...
            string[] cells = line.Split('|', StringSplitOptions.TrimEntries);
            if (cells.Length > 8 && int.TryParse(cells[3], CultureInfo.InvariantCulture, out int batch))
            {
                results[batch] =
                    (double.Parse(cells[6], CultureInfo.InvariantCulture), double.Parse(cells[8], CultureInfo.InvariantCulture));
            }
        }

        if (code == 0 && results.Count == batches.Count) return results;
        string last = string.Join('\n', errors.Split('\n').TakeLast(5));
        throw new InvalidOperationException($"{label} ended with {code} after {results.Count} of {batches.Count} batch sizes: {last}");
    }

    private static (int Code, string Output, string Errors) Run(string program, IEnumerable<string> arguments)
    {
        using Process process = Process.Start(new ProcessStartInfo(program, arguments)
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            WorkingDirectory = Path.GetTempPath(), // some write logs to their working directory
        })!;
        Task<string> errors = process.StandardError.ReadToEndAsync();
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return (process.ExitCode, output, errors.Result);
    }
}

/// <summary>Tokens per second.</summary>
internal sealed record Throughput(double Prefill256, SortedDictionary<int, double> Decode)
{
    /// <summary>The median of each number.</summary>
    public static Throughput Median(IReadOnlyList<Throughput> runs) => new(
        MedianOf(runs.Select(run => run.Prefill256)),
        new SortedDictionary<int, double>(
            runs[0].Decode.Keys.ToDictionary(batch => batch, batch => MedianOf(runs.Select(run => run.Decode[batch])))));

    public static double MedianOf(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        return (sorted[(sorted.Length - 1) / 2] + sorted[sorted.Length / 2]) / 2;
    }
}
