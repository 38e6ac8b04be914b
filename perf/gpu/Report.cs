using System.Globalization;
using System.Text;

namespace Rollout.Gpu;

/// <summary>Stage 7: the rows as Markdown tables, in the form of perf/RESULTS.md.</summary>
internal static class Report
{
    private const string Machine = "Machine";

    /// <summary>Writes results.md and returns its text.</summary>
    public static string Write(string folder)
    {
        IReadOnlyList<Row> rows = RowFile.Read(folder);
        StringBuilder text = new();
        string device = rows.FirstOrDefault(row => (row.Table, row.Name) == (Machine, "device"))?.Text ?? "no device";
        string commit = rows.FirstOrDefault(row => (row.Table, row.Name) == (Machine, "commit"))?.Text ?? "unknown";
        text.AppendLine(CultureInfo.InvariantCulture,
            $"## {DateTime.UtcNow:yyyy-MM-dd}, the CUDA backend on {device} (`perf/gpu`), commit {commit}").AppendLine();
        foreach (Row fact in rows.Where(row => row.Table == Machine)) text.AppendLine($"- {fact.Name}: {fact.Text ?? $"**{fact.Error}**"}");
        text.AppendLine().AppendLine("Targets are those for one H200.");
        Missed(text, rows);
        foreach (IGrouping<string, Row> table in rows.Where(row => row.Table != Machine).GroupBy(row => row.Table).OrderBy(Order))
        {
            text.AppendLine().AppendLine($"**{table.Key}**").AppendLine();
            if (table.Key == Correctness.Tests) Count(text, [.. table]);
            else Print(text, [.. table]);
        }

        File.WriteAllText(Path.Combine(folder, "results.md"), text.ToString());
        return text.ToString();

        // A peer's rows go next to ours, which were measured in an earlier stage.
        static int Order(IGrouping<string, Row> table) => table.Key == Stage.Table ? int.MaxValue : table.Min(row => row.Stage);
    }

    /// <summary>Rounded to three or four digits.</summary>
    public static string Number(double value) => Math.Abs(value) switch
    {
        _ when !double.IsFinite(value) => "-",
        < 10_000 when Math.Abs(value - Math.Round(value)) <= 1e-9 * Math.Abs(value) => value.ToString("F0", CultureInfo.InvariantCulture),
        >= 10_000 => value.ToString("N0", CultureInfo.InvariantCulture),
        >= 100 => value.ToString("F0", CultureInfo.InvariantCulture),
        >= 10 => value.ToString("F1", CultureInfo.InvariantCulture),
        >= 1 => value.ToString("F2", CultureInfo.InvariantCulture),
        >= 0.001 => value.ToString("0.####", CultureInfo.InvariantCulture),
        _ => value.ToString("0.#e0", CultureInfo.InvariantCulture),
    };

    private static bool IsMissed(Row row)
        => row.Target is { } target && row.Value is { } value && (row.AtLeast ? value < target : value > target);

    /// <summary>Failures and missed targets come first.</summary>
    private static void Missed(StringBuilder text, IReadOnlyList<Row> rows)
    {
        Row[] held = [.. rows.Where(row => row.Target is not null && row.Value is not null)];
        Row[] failed = [.. rows.Where(row => row.Error is not null)];
        int met = held.Count(row => !IsMissed(row));
        text.AppendLine(CultureInfo.InvariantCulture, $"{met} of {held.Length} targets met, {failed.Length} failures.");
        foreach (Row row in failed.Where(row => row.Table != Correctness.Tests)) // tests have their own list
            text.AppendLine($"- {row.Table}, {row.Name}: **failed**: {Escape(row.Error!)}");
        foreach (Row row in held.Where(IsMissed))
            text.AppendLine($"- {row.Table}, {row.Name}, {row.Column}: {Number(row.Value!.Value)}, target {Bound(row)}, **missed**");
    }

    private static void Print(StringBuilder text, Row[] rows)
    {
        string[] columns = [.. rows.Select(row => row.Column).Distinct()];
        text.AppendLine($"| | {string.Join(" | ", columns.Select(Escape))} |");
        text.AppendLine($"|---|{string.Concat(columns.Select(column => HasNumbers(column) ? "--:|" : "---|"))}");
        foreach (IGrouping<string, Row> line in rows.GroupBy(row => row.Name))
        {
            Dictionary<string, Row> cells = line.ToDictionary(row => row.Column);
            string[] texts = [.. columns.Select(column => cells.TryGetValue(column, out Row? row) ? Cell(row) : "")];
            text.AppendLine($"| {Escape(line.Key)} | {string.Join(" | ", texts)} |");
        }

        bool HasNumbers(string column) => rows.Any(row => row.Column == column && row.Value is not null);
    }

    private static string Cell(Row row)
    {
        if (row.Error is not null) return $"**failed**: {Escape(row.Error)}";
        if (row.Value is not { } value) return Escape(row.Text ?? "");
        if (row.Target is null) return Number(value);
        return $"{Number(value)} ({Bound(row)}, {(IsMissed(row) ? "**missed**" : "met")})";
    }

    private static string Bound(Row row) => $"{(row.AtLeast ? ">=" : "<=")} {Number(row.Target!.Value)}";

    private static void Count(StringBuilder text, Row[] rows)
    {
        int failed = rows.Count(row => row.Error is not null), skipped = rows.Count(row => row.Text == "skipped");
        text.AppendLine(CultureInfo.InvariantCulture, $"{rows.Length - failed - skipped} passed, {failed} failed, {skipped} skipped.");
        foreach (Row row in rows.Where(row => row.Error is not null)) text.AppendLine($"- {row.Name}: **failed**: {row.Error}");
    }

    private static string Escape(string text) => text.Replace("|", "\\|", StringComparison.Ordinal).ReplaceLineEndings(" ");
}
