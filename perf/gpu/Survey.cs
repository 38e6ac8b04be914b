using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;

namespace Rollout.Gpu;

/// <summary>
/// Stage 3: the results and times of every algorithm of cuBLASLt for every weight shape of a model, at row counts from 1 to 8192. All of it
/// goes to survey.jsonl; the table shows how many classes of equal bits there are, and how far the chosen one is from the fastest.
/// </summary>
internal static class Survey
{
    private const int MostLogitRows = 512;

    private static readonly int[] s_rows = [1, 2, 3, 8, 16, 17, 32, 64, 65, 128, 256, 257, 512, 1024, 2048, 4096, 8192];
    private static readonly int[] s_shownRows = [1, 8, 64, 256, 2048, 8192];

    public static IReadOnlyList<Part> Parts { get; } = [.. Shapes.All.Select(name => new Part(name, 60, stage => RunAsync(stage, name)))];

    private static Task RunAsync(Stage stage, string name)
    {
        ModelSpec model = Shapes.Load(name, stage.IsSmall);
        AttentionSpec attention = model.Layers[0].Attention;
        int width = model.Layers[0].FeedForward.Width;
        (string What, int Outputs, int Inputs, MatMulOutput Kind, int MostRows)[] shapes =
        [
            ("q, k, v", attention.QueryWidth + (2 * attention.KvWidth), model.HiddenSize, MatMulOutput.Fp32, int.MaxValue),
            ("output", model.HiddenSize, attention.QueryWidth, MatMulOutput.AddFp32, int.MaxValue),
            ("gate, up", 2 * width, model.HiddenSize, MatMulOutput.Stored, int.MaxValue),
            ("down", model.HiddenSize, width, MatMulOutput.AddFp32, int.MaxValue),
            ("head", model.VocabSize, model.HiddenSize, MatMulOutput.Fp32, MostLogitRows),
        ];
        using CudaBackend backend = new();
        string table = $"cuBLASLt, {name}";
        foreach ((string what, int outputs, int inputs, MatMulOutput kind, int mostRows) in shapes)
        {
            string row = $"{what} [{outputs}, {inputs}] {kind}";
            stage.Try(table, row, () =>
            {
                using (Weight weight = backend.AllocateWeight(outputs, inputs))
                using (Tensor input = backend.AllocateTensor(1, inputs, rounded: true))
                using (Tensor output = backend.AllocateTensor(1, outputs, rounded: kind == MatMulOutput.Stored))
                    backend.MatMul(input, weight, null, output, 1); // which chooses
                int[] rows = [.. s_rows.Where(count => count <= (stage.IsSmall ? 17 : mostRows))];
                IReadOnlyList<MatMulCandidate> candidates = backend.SurveyMatMul(outputs, inputs, kind, rows);
                foreach (MatMulCandidate candidate in candidates)
                    RowFile.Append(stage.Output, "survey.jsonl", new { name, what, outputs, inputs, kind = $"{kind}", candidate });
                Summarise(stage, table, row, rows, candidates);
            });
        }

        return Task.CompletedTask;
    }

    private static void Summarise(Stage stage, string table, string row, int[] rows, IReadOnlyList<MatMulCandidate> candidates)
    {
        MatMulCandidate[] keeping = [.. candidates.Where(candidate => candidate.Rows.All(at => at.Failure is null && at.KeepsRows))];
        MatMulCandidate[] chosen = [.. candidates.Where(candidate => candidate.IsChosen)];
        MatMulCandidate[] alike = [.. keeping.Where(candidate => chosen.Any(other => Bits(other) == Bits(candidate)))];
        stage.Write(table, row, "candidates", candidates.Count);
        stage.Write(table, row, "run and keep rows apart", keeping.Length);
        stage.Write(table, row, "classes of bits among these", keeping.Select(Bits).Distinct().Count());
        stage.Write(table, row, "chosen", chosen.Length);
        foreach (int count in s_shownRows.Intersect(rows))
        {
            stage.Write(table, row, $"{count}: us, chosen / best of its bits / best of all",
                $"{Best(chosen, count)} / {Best(alike, count)} / {Best(candidates, count)}");
        }

        static string Bits(MatMulCandidate candidate)
            => string.Join(' ', candidate.Rows.Select(at => $"{at.Digest} {at.BiasDigest} {at.AddDigest}"));

        static string Best(IEnumerable<MatMulCandidate> some, int count)
        {
            double[] seconds = [.. some.SelectMany(candidate => candidate.Rows)
                .Where(at => at.Rows == count && at.Failure is null).Select(at => at.Seconds)];
            return seconds.Length == 0 ? "-" : Report.Number(seconds.Min() * 1e6);
        }
    }
}
